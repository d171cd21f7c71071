"""Adapters over quantised base layers: the base runs its own product, the update is fused, PEFT's meaning is kept.

bitsandbytes and torchao come with the test extra. HQQ is tried where it is installed: it has no wheels, and building
it starts a build of CUDA code. Of GPTQ, AWQ and AQLM, whose kernels need a GPU or a compiler of their own, PEFT's
adapter layers are tried over a stand-in.
"""

import copy
import pickle

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners import lora
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from gci_kernels import ALoRAConfig, LoKIConfig, LoRAMoEConfig, patch, report, unpatch
from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.ops import lora_linear
from gci_kernels.tuners import AdaptedLinear, fusion
from gci_kernels.tuners.lora import FusedLora

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Merge lora module", "ignore:Unmerge lora module", "ignore:.*will be cast from"),
]

TARGETS = ["q_proj", "down_proj"]
IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 77], [1, 44, 2, 96, 55, 13, 70]])
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with biases in its linear layers, saved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, initializer_range=0.2, attention_bias=True,
        mlp_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path := tmp_path_factory.mktemp("llama"))
    return path


def _loaded(quantization):
    """from_pretrained with what `quantization` makes of the dtype."""

    def load(folder, dtype: torch.dtype) -> nn.Module:
        return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization(dtype))

    return load


def _hqq(folder, dtype: torch.dtype) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq has no wheels, and building it starts nvcc")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            config = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
            layer = quantize.HQQLinear(module, config, compute_dtype=dtype, device="cpu")
            model.model.set_submodule(name, layer)
    return model


BASES = {
    "nf4": _loaded(
        lambda dtype: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    ),
    "int8": _loaded(lambda dtype: BitsAndBytesConfig(load_in_8bit=True)),
    "torchao int8": _loaded(lambda dtype: TorchAoConfig(Int8WeightOnlyConfig())),
    "torchao int4": _loaded(lambda dtype: TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(32)))),
    "hqq": _hqq,
}
# What the base product's column of the report says.
OWN_CALL = {
    "nf4": "own call: Linear4bit is not torch.nn.Linear",
    "int8": "own call: Linear8bitLt is not torch.nn.Linear",
    "torchao int8": "own call: its weight is a Int8Tensor",
    "torchao int4": "own call: its weight is a IntxUnpackedToInt8Tensor",
    "hqq": "own call: HQQLinear is not torch.nn.Linear",
}
# Those for which PEFT's layer takes a bias of its own.
WITH_LORA_BIAS = ("nf4", "int8")


@pytest.fixture(params=BASES)
def base(request) -> str:
    return request.param


def lora_config(**changes) -> LoraConfig:
    """LoRA with an effect (B is random)."""
    return LoraConfig(**dict(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False) | changes)


def with_lora(folder, base: str, dtype: torch.dtype = torch.float32, **changes) -> PeftModel:
    """PEFT's LoRA over a quantised model, in evaluation mode; the same at every call."""
    model = BASES[base](folder, dtype)
    torch.manual_seed(1)
    return get_peft_model(model, lora_config(**changes)).eval()


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (lora.LoraLayer, AdaptedLinear))]


@pytest.fixture
def fused_calls(monkeypatch) -> list[tuple]:
    """The weight and bias that every call of the fused op by a patched LoRA layer was given."""
    calls = []

    def spy(x, weight, bias, *args, **kwargs):
        calls.append((weight, bias))
        return lora_linear(x, weight, bias, *args, **kwargs)

    monkeypatch.setattr("gci_kernels.tuners.lora.lora_linear", spy)
    return calls


def run(layer: nn.Module, x: torch.Tensor, dout: torch.Tensor) -> list[torch.Tensor]:
    """y and the gradients of x and of all that is trained."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dout)
    return [y, x.grad, *(parameter.grad for parameter in layer.parameters() if parameter.requires_grad)]


def truth(layer: lora.LoraLayer, x: torch.Tensor, dout: torch.Tensor, names: list[str]) -> list[torch.Tensor]:
    """What :func:`run` should give: the base layer's own, and the adapters in float64."""
    y, dx = run(layer.base_layer.requires_grad_(False), x, dout)
    wide, parameters = x.double().requires_grad_(), []
    total = 0
    for name in names:
        A, B = (copy.deepcopy(part[name]).double() for part in (layer.lora_A, layer.lora_B))
        total = total + layer.scaling[name] * B(A(wide))
        parameters.append((A.weight, B.weight, *(() if B.bias is None else (B.bias,))))
    gradients = torch.autograd.grad(total, [wide, *(p for each in parameters for p in each)], dout.double())
    order = iter(gradients[1:])
    by_adapter = [[next(order) for _ in each] for each in parameters]
    # parameters() gives lora_A of all adapters first
    flat = [each[0] for each in by_adapter] + [gradient for each in by_adapter for gradient in each[1:]]
    return [y.double() + total, dx.double() + gradients[0], *flat]


# PEFT's LoRA


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "rslora", "dropout", "lora_bias", "two adapters"])
def test_layers_compute_what_those_of_peft_do(folder, base, kind, dtype, fused_calls):
    """Forward and gradients: at most twice PEFT's own distance from the base product and exact adapters."""
    if kind == "lora_bias" and base not in WITH_LORA_BIAS:
        with pytest.raises(ValueError, match="does not support lora_bias"):
            with_lora(folder, base, dtype, lora_bias=True)
        return
    changes = {"rslora": {"use_rslora": True}, "dropout": {"lora_dropout": 0.5}, "lora_bias": {"lora_bias": True}}
    model, names = with_lora(folder, base, dtype, **changes.get(kind, {})), ["default"]
    if kind == "two adapters":
        model.add_adapter("other", lora_config(r=3))
        names = ["other", "default"]
        model.base_model.set_adapter(names)
    model.train(kind != "dropout")  # random in training: it has tests of its own
    for layer in layers(model)[:2]:
        layer.requires_grad_(False)
        for name in names:
            layer.lora_A[name].requires_grad_()
            layer.lora_B[name].requires_grad_()
        x = torch.randn(2, 9, layer.in_features).to(dtype)
        dout = torch.randn(2, 9, layer.out_features).to(dtype)
        exact = truth(layer, x, dout, list(layer.lora_A) if len(names) > 1 else names)
        plain = run(layer, x, dout)
        patch(model)
        fused = run(layer, x, dout)
        unpatch(model)
        assert len(fused) == len(exact) == 2 + (2 + (kind == "lora_bias")) * len(names)
        for ours, theirs, true in zip(fused, plain, exact, strict=True):
            assert ours.dtype == theirs.dtype
            assert relative_error(ours, true) <= error_bound(relative_error(theirs, true), dtype)
    assert fused_calls == [(None, None)] * 2 * len(names)


def test_dropout_in_training_drops(folder, base):
    model = patch(with_lora(folder, base, lora_dropout=0.5)).train()
    layer = layers(model)[0]
    x = torch.randn(9, layer.in_features)
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)


def test_a_model_trains_as_it_does_in_peft(folder, base):
    """Gradient checkpointing, prepare_model_for_kbit_training, bias="lora_only", and an optimizer's step."""
    losses, weights = [], []
    for use in (patch, lambda model: model):
        model = BASES[base](folder, torch.float32)
        if base in ("nf4", "int8"):
            model = prepare_model_for_kbit_training(model)
        torch.manual_seed(1)
        model = use(get_peft_model(model, lora_config(bias="lora_only"))).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.01)
        for _ in range(3):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        weights.append([parameter.detach() for parameter in trained])
    assert losses[0] > losses[2]
    # int8 rounds activations: what float32 rounds another way can land on the next of its steps
    tolerance = 1e-2 if base == "int8" else 1e-4
    torch.testing.assert_close(losses[:3], losses[3:], rtol=tolerance, atol=0)
    assert len(weights[0]) == len(weights[1]) > 8 - 4 * (base == "hqq")
    for ours, theirs in zip(*weights, strict=True):
        assert relative_error(ours, theirs) < tolerance


def test_generation(folder, base, monkeypatch):
    """The tokens that PEFT's layers give; every decoding step's update by one kernel."""
    from gci_kernels.ops.decode import native

    settings = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)
    model, steps, own = with_lora(folder, base), [], native.Step.run
    expected = model.generate(**settings)
    monkeypatch.setattr(native.Step, "run", lambda *args: steps.append(1) or own(*args))
    assert torch.equal(patch(model).generate(**settings), expected)
    assert len(steps) == 6 * 4


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_base_product_is_left_as_it_was(folder, base, tokens):
    """One call of the base layer for each forward, and nobody writes into what it returned."""
    layer = layers(patch(with_lora(folder, base)))[1]
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, y: seen.append((y, y.clone())))
    with torch.no_grad():
        y = layer(torch.randn(1, tokens, layer.in_features))
    assert len(seen) == 1 and torch.equal(*seen[0]) and not torch.equal(y, seen[0][0])


@pytest.mark.parametrize("autocast", [False, True])
def test_a_decoding_step_adds_what_training_adds(folder, base, autocast, monkeypatch):
    layer = layers(patch(with_lora(folder, base, torch.bfloat16)))[1]
    x = torch.randn(2, 1, layer.in_features).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", enabled=autocast):
        step = layer(x)
        monkeypatch.setattr(fusion, "decodes", lambda x: False)
        assert relative_error(step, layer(x)) < 1e-2 and step.dtype == torch.bfloat16


def test_each_sequence_with_an_adapter_of_its_own(folder, base):
    model = with_lora(folder, base)
    model.add_adapter("other", lora_config(r=3))
    names = ["other", "__base__"]
    with torch.no_grad():
        expected = model.eval()(IDS, adapter_names=names).logits
        step = patch(model)(IDS, adapter_names=names).logits  # few enough tokens for the kernel
        many = model(IDS.repeat(1, 3), adapter_names=names).logits
        expected_of_many = unpatch(model)(IDS.repeat(1, 3), adapter_names=names).logits
    tolerance = 1e-2 if base == "int8" else 1e-5
    assert relative_error(step, expected) < tolerance and relative_error(many, expected_of_many) < tolerance


def test_merging_is_that_of_peft(folder, base):
    results = []
    for use in (patch, lambda model: model):
        model = use(with_lora(folder, base))
        with torch.no_grad():
            try:
                model.merge_adapter()
            except Exception as error:  # what PEFT cannot merge it refuses by itself
                results.append((type(error), str(error)))
                continue
            results.append((model(IDS).logits, None))
            model.unmerge_adapter()
            results.append((model(IDS).logits, None))
    half = len(results) // 2
    for (ours, reason), (theirs, wanted) in zip(results[:half], results[half:], strict=True):
        assert reason == wanted
        assert ours is theirs if reason else relative_error(ours, theirs) < (2e-2 if base == "int8" else 1e-5)
    assert half == 2 or base == "torchao int4", results


def test_saved_and_loaded(folder, base, tmp_path):
    model = patch(with_lora(folder, base))
    with torch.no_grad():
        expected = model(IDS).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(BASES[base](folder, torch.float32), tmp_path).eval()
        assert relative_error(patch(again)(IDS).logits, expected) < 1e-6


def test_unpatched_layers_are_as_they_were(folder, base):
    model = with_lora(folder, base)
    before = [(type(layer), dict(vars(layer))) for layer in layers(model)]
    patch(model)
    for layer, (kind, _) in zip(layers(model), before, strict=True):
        assert isinstance(layer, FusedLora) and isinstance(layer, kind)
        assert (type(layer).__name__, type(layer).__module__) == (kind.__name__, kind.__module__)
    assert isinstance(layers(copy.deepcopy(model))[0], FusedLora)
    if not base.startswith("torchao"):  # PEFT's own layer holds on to a function that cannot be pickled
        assert isinstance(layers(pickle.loads(pickle.dumps(model)))[0], FusedLora)
    assert patch(model) is model
    unpatch(model)
    assert [(type(layer), dict(vars(layer))) for layer in layers(model)] == before


def test_report(folder, base):
    model = with_lora(folder, base)
    assert {line.declined for line in report(model)} == {"not patched: call gci_kernels.patch(model)"}
    lines = report(patch(model))
    assert len(lines) == 4 and {line.base for line in lines} == {OWN_CALL[base]}
    assert all(line.declined is None and line.plan.startswith("project=") for line in lines)
    assert {line.dtype for line in lines} == {"quantised" if base == "int8" else "float32"}
    # the plan of the update's own dtype, not of the codes' that the base layer keeps
    assert lines[0].plan == report(patch(with_lora(folder, "torchao int8")))[0].plan


@pytest.mark.parametrize("base", [each for each in BASES if each != "int8"])  # whose second DoRA forward PEFT fails
def test_dora_is_declined(folder, base):
    model = with_lora(folder, base, use_dora=True)
    with torch.no_grad():
        expected = model(IDS).logits
        with pytest.raises(ValueError, match="nothing to patch.*DoraLinearVariant, which changes the formula"):
            patch(model)
        model.add_adapter("plain", lora_config())
        patch(model)
        assert torch.equal(model(IDS).logits, expected)
    assert all("DoraLinearVariant, which changes the formula" in line.declined for line in report(model))


# Kinds of LoRA that differ in how they start


@pytest.mark.parametrize("start", ["gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_starts_that_are_plain_lora_afterwards(folder, start, fused_calls):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, lora_config(init_lora_weights=start)).double().eval()
    for layer in layers(model):
        nn.init.normal_(layer.lora_B["default"].weight)
    with torch.no_grad():
        expected = model(IDS).logits
        assert relative_error(patch(model)(IDS).logits, expected) < 1e-12
    assert len(fused_calls) == 4 and all(weight is not None for weight, _ in fused_calls)


# PEFT's layers for libraries that need a GPU


class QuantLinear(nn.Module):
    """Keeps its weight as GPTQ's, AWQ's and AQLM's layers do: not as a weight."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = self.infeatures = in_features
        self.out_features = self.outfeatures = out_features
        self.register_buffer("qweight", torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 16)


@pytest.mark.parametrize("kind", [GPTQLoraLinear, AwqLoraLinear, AqlmLoraLinear])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_for_other_libraries(kind, dtype, fused_calls):
    layer = kind(QuantLinear(64, 48), "default", config=lora_config(), r=4, lora_alpha=6)
    x, dout = torch.randn(9, 64).to(dtype), torch.randn(9, 48).to(dtype)
    exact, plain = truth(layer, x, dout, ["default"]), run(layer, x, dout)
    model = patch(nn.Sequential(layer))
    assert report(model)[0].base == "own call: QuantLinear is not torch.nn.Linear"
    for ours, theirs, true in zip(run(layer, x, dout), plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, true) <= error_bound(relative_error(theirs, true), dtype)
    assert fused_calls == [(None, None)]
    assert type(unpatch(model)[0]) is kind


def test_a_layer_of_the_same_name_from_elsewhere_is_left_alone():
    for package in ("layer", "mine.lora.layer"):
        kind = type("Linear", (lora.Linear,), {"__module__": package})
        model = nn.Sequential(kind(nn.Linear(4, 4), "default", config=lora_config(), r=2, lora_alpha=2))
        with pytest.raises(ValueError, match="layer.Linear has no fused form"):
            patch(model)


# The package's own methods

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
    from gci_kernels.tuners.loki import dequantised_weight

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
