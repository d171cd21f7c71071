"""patch(upcast_frozen=True) and its op: frozen layers in float32 products where the CPU has no fast 16-bit one."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gci_kernels
from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.ops import frozen_linear as op
from gci_kernels.ops import upcast
from gci_kernels.tuners.frozen import UpcastLinear

CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    tie_word_embeddings=True,
)  # fmt: skip
IDS = torch.arange(1, 25).view(2, 12)
ADAPTER = gci_kernels.LoRAMoEConfig(r=2, num_experts=4, init_weights=False)


@pytest.fixture
def no_bfloat16(monkeypatch):
    """As on a processor without bfloat16 instructions."""
    monkeypatch.setitem(upcast.LIBRARY_MULTIPLIES, torch.bfloat16, False)


def make(dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    model = gci_kernels.patch(model, ADAPTER, **options) if options else model
    return model.to(dtype)


def swapped(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, UpcastLinear)}


def gradients(model):
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"loss": loss.detach()} | found


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", upcast.HALVES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", [(130, 67), (2, 5, 67), (1, 67), (0, 67)], ids=str)
@pytest.mark.parametrize("strided", (False, True))
def test_against_float64(dtype, shape, strided, monkeypatch):
    monkeypatch.setattr(upcast, "_BLOCK", 700)
    g = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    x, weight, bias, dy = draw(*shape), draw(45, 67), draw(45), draw(*shape[:-1], 45)
    if strided:
        x = torch.stack((x, x), -1)[..., 0]
    x.requires_grad_()
    y = op.frozen_linear(x, weight, bias)
    (dx,) = torch.autograd.grad(y, x, dy)
    truth, dtruth = x.double() @ weight.double().t() + bias.double(), dy.double() @ weight.double()
    for actual, expected in ((y, truth), (dx, dtruth)):
        assert actual.shape == expected.shape and actual.dtype == dtype
        assert relative_error(actual, expected) <= 1.01 * relative_error(expected.to(dtype), expected)


def test_registered_operators():
    x, weight, bias = torch.randn(2, 3, 8).bfloat16(), torch.randn(5, 8).bfloat16(), torch.randn(5).bfloat16()
    for each in (None, bias):
        torch.library.opcheck(torch.ops.gci_kernels.frozen_linear.default, (x.requires_grad_(), weight, each))
    torch.library.opcheck(torch.ops.gci_kernels.frozen_linear_dx.default, (torch.randn(2, 3, 5).bfloat16(), weight))


def test_losses_and_gradients_of_a_model(no_bfloat16):
    plain, fused, wide = make(upcast_frozen=False), make(upcast_frozen=True), make(torch.float32, upcast_frozen=False)
    wide.load_state_dict(fused.state_dict())  # the same rounded weights
    truth, plain, fused_gradients = gradients(wide.double()), gradients(plain), gradients(fused)
    assert "base_model.model.lm_head" in swapped(fused) and len(swapped(fused)) == 2 * 7 + 1
    assert fused_gradients.keys() == truth.keys() and len(truth) > 10
    for name, expected in truth.items():
        bound = error_bound(relative_error(plain[name], expected), torch.bfloat16)
        assert relative_error(fused_gradients[name], expected) <= bound, name


def test_which_layers(no_bfloat16, monkeypatch):
    calls = []
    original = op.frozen_linear
    monkeypatch.setattr("gci_kernels.tuners.frozen.frozen_linear", lambda *a: calls.append(a[1].shape) or original(*a))
    model = make(upcast_frozen=True)
    model(input_ids=IDS)
    assert len(calls) == 2 * 4 + 1, "q, k, v, o and the head: gate, up and down are the adapters'"
    for change in (
        lambda: model(input_ids=IDS[:1, :2]),  # too few tokens
        lambda: model.float()(input_ids=IDS),
        lambda: monkeypatch.setitem(upcast.LIBRARY_MULTIPLIES, torch.bfloat16, True) or model.bfloat16()(input_ids=IDS),
    ):
        calls.clear()
        change()
        assert not calls
    monkeypatch.setitem(upcast.LIBRARY_MULTIPLIES, torch.bfloat16, False)
    model.get_base_model().lm_head.weight.requires_grad_()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert torch.Size([97, 32]) not in calls and model.get_base_model().lm_head.weight.grad is not None
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.float()(input_ids=IDS)
    assert not calls


def test_trained_layers_and_other_kinds_are_left_alone(no_bfloat16):
    class Own(nn.Linear):
        pass

    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    model.model.layers[0].self_attn.q_proj.__class__ = Own
    config = gci_kernels.LoRAMoEConfig(r=2, num_experts=4, modules_to_save=["lm_head"])
    patched = gci_kernels.patch(model, config, upcast_frozen=True)
    names = swapped(patched)
    assert not any("q_proj" in name and "layers.0" in name for name in names)
    assert not any("lm_head.modules_to_save" in name for name in names)


def test_unpatch_gives_the_plain_model_back(no_bfloat16):
    model = make()
    expected = model(input_ids=IDS).logits
    classes = {name: type(module) for name, module in model.named_modules()}
    for later in (False, True):
        patched = gci_kernels.patch(model, ADAPTER, upcast_frozen=not later)
        if later:
            assert gci_kernels.patch(patched, upcast_frozen=True) is patched
        assert swapped(patched)
        assert gci_kernels.unpatch(patched) is model
        assert {name: type(module) for name, module in model.named_modules()} == classes
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_a_failing_patch_swaps_nothing():
    model = make()
    with pytest.raises(ValueError, match="no module is named"):
        gci_kernels.patch(model, gci_kernels.LoRAMoEConfig(target_modules=["gate"]), upcast_frozen=True)
    assert not swapped(model)


def test_adapters_added_later_still_own_the_base_product(no_bfloat16):
    model = make(upcast_frozen=True)
    model.add_adapter("second", gci_kernels.LoRAMoEConfig(r=2, num_experts=4, target_modules=["q_proj"]))
    model.set_adapter("second")
    assert {layer.base for layer in gci_kernels.report(model)} == {"fused"}


def test_copies_and_pickles(no_bfloat16):
    model = make(upcast_frozen=True)
    expected = model(input_ids=IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert swapped(other) == swapped(model) and torch.equal(other(input_ids=IDS).logits, expected)


def test_compiled_as_one_graph(no_bfloat16):
    model = make(upcast_frozen=True)
    layer = model.get_base_model().lm_head
    x = torch.randn(9, 32).bfloat16()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(3, 8)), ValueError, "frozen_linear cannot run here: its products are for bfloat16 and"),
        (dict(weight=torch.zeros(5, 7).bfloat16()), ValueError, r"weight must be \[any, 8\], got \[5, 7\]"),
        (dict(weight=torch.zeros(5, 8)), TypeError, "weight must have x's dtype torch.bfloat16"),
        (dict(bias=torch.zeros(4).bfloat16()), ValueError, r"bias must be \[5\]"),
        (dict(weight=torch.zeros(5, 8).bfloat16().requires_grad_()), ValueError, "weight and bias must be frozen"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = dict(x=torch.zeros(3, 8).bfloat16(), weight=torch.zeros(5, 8).bfloat16(), bias=None)
    with pytest.raises(error, match=message):
        op.frozen_linear(**arguments | change)
