"""The package's own methods over quantised base layers: what they are over the dequantised weights."""

import pytest
import torch
import toy_quantised
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from torch import nn
from toy_quantised import BASES, IDS, OWN_CALL, TARGETS, QuantLinear, layers

from gci_kernels import ALoRAConfig, LoKIConfig, LoRAMoEConfig, patch, report
from gci_kernels.accuracy import relative_error
from gci_kernels.tuners import fusion
from gci_kernels.tuners.loki import dequantised_weight

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Merge lora module", "ignore:Unmerge lora module", "ignore:.*will be cast from"),
]
folder, base = toy_quantised.folder, toy_quantised.base


OWN = {
    "loramoe": LoRAMoEConfig(target_modules=TARGETS, init_weights=False),
    "alora": ALoRAConfig(r=8, target_modules=TARGETS, init_weights=False),
    "loki": LoKIConfig(positions=[[3, 9, 40]] * 2, init_weights=False),
    "loki star": LoKIConfig(positions=[[3, 9, 40]] * 2, r=4, init_weights=False),
}


def adapted(model: nn.Module, method: str) -> PeftModel:
    """Adapted with an effect, the same for every base, in training mode."""
    torch.manual_seed(1)
    model = patch(model, OWN[method]).train()
    for name, parameter in model.named_parameters():
        if "loki_active" in name:
            torch.manual_seed(2)
            nn.init.normal_(parameter.data, std=0.3)
    return model


def dequantised(model: nn.Module) -> nn.Module:
    """The same model with plain layers of the weights that the quantised ones stand for."""
    for name, module in list(model.model.named_modules()):
        if fusion.has_rows(module):
            weight = dequantised_weight(module).detach()
            plain = nn.Linear(weight.shape[1], weight.shape[0])
            plain.weight.data, plain.bias.data = weight.float(), module.bias.detach().float()
            model.model.set_submodule(name, plain.requires_grad_(False))
    return model


@pytest.mark.parametrize("method", OWN)
def test_own_methods_are_what_they_are_over_the_dequantised_weights(folder, base, method):
    """Logits and the adapters' gradients."""
    quantised = adapted(BASES[base](folder, torch.float32), method)
    plain = adapted(dequantised(BASES[base](folder, torch.float32)), method)
    assert {line.base for line in report(quantised)} == {OWN_CALL[base]}
    # int8 rounds the activations too; the others compute with float32
    tolerance = 5e-2 if base == "int8" else 1e-4
    gradients = []
    for model in (quantised, plain):
        logits = model(IDS).logits
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        trained = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
        gradients.append({"logits": logits.detach(), **trained})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 4
    for name, expected in gradients[1].items():
        assert expected.norm() > 0 or "positions" in name
        assert relative_error(gradients[0][name], expected) < tolerance, name


@pytest.mark.parametrize("method", OWN)
def test_own_methods_generate_save_and_load(folder, base, method, tmp_path):
    settings = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)
    model = adapted(BASES[base](folder, torch.float32), method).eval()
    with torch.no_grad():
        tokens, logits = model.generate(**settings), model(IDS).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(BASES[base](folder, torch.float32), tmp_path).eval()
        assert relative_error(again(IDS).logits, logits) < 1e-6
        assert torch.equal(again.generate(**settings), tokens)
        longer = model(tokens).logits[:, IDS.shape[1] - 1 : -1]
    # a step and a whole sequence round another way: only where two tokens are all but equal may they differ
    if base not in ("nf4", "int8"):
        assert torch.equal(longer.argmax(-1), tokens[:, IDS.shape[1] :])
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()


@pytest.mark.parametrize("first", ["nothing", "inference"])
def test_rows_start_as_the_base_layers_own(folder, base, first):
    """Also after an inference, in which bitsandbytes may lay its weight out anew; and the base layer still runs."""
    expected = dequantised(BASES[base](folder, torch.float32))
    model = BASES[base](folder, torch.float32)
    with torch.no_grad():
        if first == "inference":
            model(IDS)
        model = patch(model, LoKIConfig(positions=[[3, 9, 40]] * 2))
        for mine, layer in zip(layers(model), expected.model.layers, strict=True):
            rows = layer.mlp.down_proj.weight[[3, 9, 40]]
            # packed, nf4 keeps its scales in bfloat16
            assert relative_error(mine.loki_active["default"], rows) < (1e-2 if base == "nf4" else 1e-6)
        model(IDS)
        with model.disable_adapter():
            model(IDS)


def test_kinds_of_base_layers_that_are_told_apart():
    assert isinstance(Linear4bit(4, 4), nn.Linear) and isinstance(Linear8bitLt(4, 4), nn.Linear)
    assert fusion.is_linear(QuantLinear(4, 4)) and not fusion.has_rows(QuantLinear(4, 4))
    assert not any(map(fusion.is_linear, (nn.Bilinear(4, 4, 4), nn.Embedding(4, 4), nn.LayerNorm(4))))
