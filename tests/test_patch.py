"""patch and unpatch change nothing but the adapted layers, and unpatch restores what was there before."""

import pytest
import torch
from peft import PeftModel
from peft.tuners import lora
from torch import nn
from toy_lora import (
    IDS,
    TARGETS,
    Fingerprint,
    adapted_layers,
    assert_same,
    logits,
    lora_config,
    tiny_llama,
    with_lora,
    with_two_adapters,
)

from gci_kernels import LoRAMoEConfig, patch, unpatch
from gci_kernels.accuracy import relative_error
from gci_kernels.tuners import FusedLoraLinear, LoRAMoELinear
from gci_kernels.tuners.lora import FusedLoraTuner

pytestmark = pytest.mark.usefixtures("one_thread")


# What patch and unpatch leave alone


def test_patch_and_unpatch_leave_everything_else():
    model = with_two_adapters(use_rslora=True).train()
    model.base_model.model.lm_head.eval()
    hooked = model.base_model.model.model.layers[0].mlp.gate_proj
    hooked.register_forward_hook(lambda *_: None)
    before = Fingerprint(model)
    assert patch(model) is model

    patched = Fingerprint(model)
    for name, (identity, cls, attributes) in before.modules.items():
        now = {lora.Linear: FusedLoraLinear, lora.LoraModel: FusedLoraTuner}.get(cls, cls)
        assert patched.modules[name] == (identity, now, attributes), name
    assert FusedLoraLinear in {type(module) for module in model.modules()}
    assert list(patched.values) == list(before.values) and patched.flags == before.flags

    assert unpatch(model) is model
    before.assert_equal(Fingerprint(model))


def test_unpatch_keeps_trained_values():
    model = patch(with_lora())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    trained = logits(model)
    assert relative_error(logits(unpatch(model)), trained) < 1e-10
    assert relative_error(trained, logits(with_lora())) > 1e-4


def test_patching_twice_changes_nothing():
    model = patch(with_lora())
    before = Fingerprint(model)
    assert patch(model) is model
    before.assert_equal(Fingerprint(model))


def test_patching_twice_while_dora_is_active_changes_nothing():
    model = patch(with_two_adapters(use_dora=True, target_modules=TARGETS))
    model.base_model.set_adapter("other")
    before = Fingerprint(model)
    patch(model)
    before.assert_equal(Fingerprint(model))


def test_patching_a_loramoe_model_again_changes_nothing():
    model = patch(tiny_llama(), LoRAMoEConfig())
    before = Fingerprint(model)
    assert patch(model) is model
    before.assert_equal(Fingerprint(model))


# patch(model, config)


@pytest.mark.parametrize(
    ("config", "fused"),
    [(lora_config(), FusedLoraLinear), (LoRAMoEConfig(target_modules=TARGETS, init_weights=False), LoRAMoELinear)],
    ids=["LoRA", "LoRAMoE"],
)
def test_patch_with_config_adds_the_adapter_and_unpatch_takes_it_away(config, fused):
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    before = Fingerprint(model)

    patched = patch(model, config, adapter_name="mine")
    assert isinstance(patched, PeftModel) and patched.get_base_model() is model
    assert list(patched.peft_config) == ["mine"]
    layers = adapted_layers(model)
    assert len(layers) == 6 and {type(layer) for layer in layers.values()} == {fused}
    assert all("mine" in name for name, parameter in patched.named_parameters() if parameter.requires_grad)
    assert relative_error(logits(patched), logits(tiny_llama())) > 1e-2
    patched(input_ids=IDS, labels=IDS).loss.backward()

    assert unpatch(patched) is model
    before.assert_equal(Fingerprint(model))
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_patch_leaves_the_config_alone():
    config = LoRAMoEConfig()
    patched = patch(tiny_llama(), config)
    assert config == LoRAMoEConfig() != patched.peft_config["default"]


def test_patch_with_lora_config_equals_peft():
    model = tiny_llama()
    torch.manual_seed(1)
    assert_same(patch(model, lora_config()).eval(), with_lora())


@pytest.mark.parametrize("kind", [lora_config, LoRAMoEConfig])
def test_unpatch_gives_back_modules_that_were_saved_whole(kind):
    model = tiny_llama()
    before = Fingerprint(model)
    patched = patch(model, kind(target_modules=TARGETS, modules_to_save=["lm_head"]))
    nn.init.zeros_(model.lm_head.modules_to_save["default"].weight)
    before.assert_equal(Fingerprint(unpatch(patched)))


@pytest.mark.parametrize("config", [lora_config(), LoRAMoEConfig()], ids=["LoRA", "LoRAMoE"])
def test_unpatch_under_gradient_checkpointing(config):
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    hooks = list(model.get_input_embeddings()._forward_hooks.values())
    unpatch(patch(model, config))
    assert list(model.get_input_embeddings()._forward_hooks.values()) == hooks


@pytest.mark.parametrize("make", [tiny_llama, with_lora], ids=["plain", "PEFT"])
def test_unpatch_needs_a_patched_model(make):
    with pytest.raises(ValueError, match="nothing to unpatch"):
        unpatch(make())
