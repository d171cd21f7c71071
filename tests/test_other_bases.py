"""PEFT's LoRA over quantised base layers: the base runs its own product, the update is fused, no meaning changes."""

import copy
import pickle

import pytest
import torch
import toy_quantised
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners import lora
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn
from toy_quantised import BASES, DTYPES, IDS, OWN_CALL, QuantLinear, layers, lora_config
from transformers import LlamaForCausalLM

from gci_kernels import patch, report, unpatch
from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.ops.bottleneck import adapted_linear
from gci_kernels.ops.decode import native
from gci_kernels.tuners import fusion
from gci_kernels.tuners.lora import FusedLora

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Merge lora module", "ignore:Unmerge lora module", "ignore:.*will be cast from"),
]
folder, base = toy_quantised.folder, toy_quantised.base


# Those for which PEFT's layer takes a bias of its own.
WITH_LORA_BIAS = ("nf4", "int8")


def with_lora(folder, base: str, dtype: torch.dtype = torch.float32, **changes) -> PeftModel:
    """PEFT's LoRA over a quantised model, in evaluation mode; the same at every call."""
    model = BASES[base](folder, dtype)
    torch.manual_seed(1)
    return get_peft_model(model, lora_config(**changes)).eval()


@pytest.fixture
def fused_calls(monkeypatch) -> list[tuple]:
    """The weight and bias that every call of the fused op by a patched LoRA layer was given."""
    calls = []

    def spy(operands, *args):
        calls.append(operands[1:3])
        return adapted_linear(operands, *args)

    monkeypatch.setattr("gci_kernels.tuners.lora.adapted_linear", spy)
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


# Layer for layer, and whole models


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
        monkeypatch.setattr(fusion, "takes_steps", lambda impl, x: False)
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


# Kinds of LoRA that differ in their initialisation


@pytest.mark.parametrize("start", ["gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_initialisations_that_are_plain_lora_afterwards(folder, start, fused_calls):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, lora_config(init_lora_weights=start)).double().eval()
    for layer in layers(model):
        nn.init.normal_(layer.lora_B["default"].weight)
    with torch.no_grad():
        expected = model(IDS).logits
        assert relative_error(patch(model)(IDS).logits, expected) < 1e-12
    assert len(fused_calls) == 4 and all(weight is not None for weight, _ in fused_calls)


# PEFT's layers for libraries that need a GPU


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
