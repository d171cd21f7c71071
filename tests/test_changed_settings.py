"""What is changed in a layer's settings or tensors between two calls holds in the next one, whatever was kept."""

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from toy_decoding import IDS, adapted, config, tiny_llama

from gci_kernels import LoKIConfig, patch
from gci_kernels.accuracy import relative_error

pytestmark = pytest.mark.usefixtures("poisoned")

METHODS = ("lora", "loramoe", "alora", "loki*")
PARTS = {
    "lora": ("lora_A", "lora_B"), "loramoe": ("loramoe_A", "loramoe_lora_B", "loramoe_router"),
    "alora": ("gci_alora_A", "gci_alora_qkv", "gci_alora_B"), "loki*": ("loki_A", "loki_lora_B"),
}  # fmt: skip
LONG = IDS.repeat(2, 4)  # too many tokens for a decoding step


def with_adapter(method):
    torch.manual_seed(1)
    if method == "loki*":
        return patch(tiny_llama(), LoKIConfig(positions=[[3, 9, 40], [7]], r=2, init_weights=False)).eval()
    return adapted(method)


def layers(model):
    return [module for module in model.modules() if hasattr(module, "base_layer")]


def outputs(model, ids=IDS):
    """Logits of one token, of the prompt after it, and gradients of more tokens."""
    with torch.no_grad():
        short = [model(ids[:, :1]).logits, model(ids).logits, model(LONG).logits]
    model.zero_grad()
    if any(parameter.requires_grad for parameter in model.parameters()):
        model(input_ids=LONG, labels=LONG).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return short, gradients


def assert_same(actual, wanted):
    assert all(relative_error(a, w) < 1e-5 for a, w in zip(actual[0], wanted[0], strict=True))
    assert actual[1].keys() == wanted[1].keys()
    assert all(relative_error(actual[1][name], wanted[1][name]) < 1e-5 for name in wanted[1])


def with_numbers(model):
    """A copy for which nothing is kept, whose scalings are numbers."""
    other = copy.deepcopy(model)
    for layer in layers(other):
        layer.scaling = {name: float(value) for name, value in layer.scaling.items()}
    return other


def filled(layer):
    layer.scaling["default"].fill_(0.3)


def replaced(layer):
    layer.scaling["default"] = torch.tensor(0.4)


def shaped(layer):
    layer.scaling["default"] = torch.tensor([0.4])


def whole(layer):
    layer.scaling["default"] = torch.tensor(-3)


def number(layer):
    layer.scaling["default"] = -1.5


def of_numpy(layer):
    layer.scaling["default"] = np.float32(0.7)


def dictionary(layer):
    layer.scaling = {"default": 0.2}


CHANGES = (filled, replaced, shaped, whole, number, of_numpy, dictionary)


@pytest.mark.parametrize("change", CHANGES, ids=lambda function: function.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_scalings(method, change):
    model = with_adapter(method)
    for layer in layers(model):
        layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    before = outputs(model)
    assert_same(before, outputs(with_numbers(model)))
    for layer in layers(model):
        change(layer)
    after = outputs(model)
    assert relative_error(after[0][0], before[0][0]) > 1e-3
    assert_same(after, outputs(with_numbers(model)))


@pytest.mark.parametrize("method", METHODS)
def test_a_scaling_that_is_trained(method):
    model = with_adapter(method)
    wanted = outputs(model)
    trained = [nn.Parameter(torch.tensor(layer.scaling["default"])) for layer in layers(model)]
    for layer, scaling in zip(layers(model), trained, strict=True):
        layer.__dict__["scaling"] = {"default": scaling}
    actual = outputs(model)
    assert_same(actual, wanted)
    assert all(scaling.grad is not None and scaling.grad != 0 for scaling in trained)


@pytest.mark.parametrize("method", ("lora", "loramoe", "alora"))
def test_a_scaling_for_each_output(method):
    """PEFT multiplies with whatever is there; the values go into B."""
    model = with_adapter(method)
    other = copy.deepcopy(model)
    for layer, plain in zip(layers(model), layers(other), strict=True):
        each = torch.rand(layer.out_features)
        layer.scaling["default"], plain.scaling["default"] = each, 1.0
        B = getattr(plain, PARTS[method][1 if method != "alora" else 2])["default"]
        B = getattr(B, "weight", B)
        B.data.mul_(each.unsqueeze(1))
    with torch.no_grad():
        for ids in (IDS, LONG):
            assert relative_error(model(ids).logits, other(ids).logits) < 1e-5
        for wrong in (torch.rand(3), torch.rand(2, 2)):
            layers(model)[0].scaling["default"] = wrong
            with pytest.raises(ValueError, match="scaling must be one number, or one for each of "):
                model(IDS)
        layers(model)[0].scaling["default"] = "2"
        with pytest.raises(TypeError, match="scaling must be a number or a tensor"):
            model(IDS)


def written(holder, name):
    holder._parameters[name].data.mul_(-2)


def other_memory(holder, name):
    holder._parameters[name].data = torch.randn_like(holder._parameters[name])


def other_object(holder, name):
    holder._parameters[name] = nn.Parameter(torch.randn_like(holder._parameters[name]))


@pytest.mark.parametrize("change", (written, other_memory, other_object), ids=lambda function: function.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_tensors(method, change):
    model = with_adapter(method)
    last = outputs(model)
    for part in PARTS[method]:
        for layer in layers(model):
            holder = getattr(layer, part)
            change(*((holder["default"], "weight") if method == "lora" else (holder, "default")))
        present = outputs(model)
        assert relative_error(present[0][0], last[0][0]) > 1e-4 or part == "gci_alora_qkv"
        assert_same(present, outputs(copy.deepcopy(model)))
        last = present


def test_a_rank_that_shrinks_in_the_same_memory():
    """The first rows of A lie where all of them did."""
    model = with_adapter("lora")
    outputs(model)
    for layer in layers(model):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        A.grad = B.grad = None
        smaller = B.data[:, :2].clone()
        B.data = B.data.view(-1)[: smaller.numel()].view_as(smaller).copy_(smaller)
        A.data = A.data[:2]
    assert_same(outputs(model), outputs(copy.deepcopy(model)))


def test_dtypes_that_change_in_the_same_memory():
    model = with_adapter("lora").bfloat16()
    outputs(model)
    for layer in layers(model):
        for part in PARTS["lora"]:
            weight = getattr(layer, part)["default"].weight
            weight.grad = None
            weight.data = weight.data.copy_(weight.data.half().view(torch.bfloat16)).view(torch.float16)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, fresh(IDS).logits)


# The mixer's numbers: top_k, of four experts; heads and residual.
SETTINGS = {"loramoe": ((2,), (1,), (4,)), "alora": ((4, 0), (1, 0), (2, 0), (2, 1))}


@pytest.mark.parametrize("method", SETTINGS)
def test_other_settings(method):
    model = with_adapter(method)
    for settings in SETTINGS[method]:
        before = outputs(model, IDS[:, :4])
        for layer in layers(model):
            assert len(layer.settings["default"]) == len(settings)
            layer.settings["default"] = settings
        after = outputs(model, IDS[:, :4])
        assert any(relative_error(a, b) > 1e-6 for a, b in zip(after[0], before[0], strict=True))
        assert_same(after, outputs(copy.deepcopy(model), IDS[:, :4]))


def test_scales_of_peft():
    model = with_adapter("lora")
    for call in (
        lambda layer: layer.set_scale("default", 3), lambda layer: layer.scale_layer(0.5),
        lambda layer: layer.unscale_layer(0.25), lambda layer: layer.unscale_layer(),
    ):  # fmt: skip
        before = outputs(model)
        for layer in layers(model):
            call(layer)
        after = outputs(model)
        assert relative_error(after[0][0], before[0][0]) > 1e-3
        assert_same(after, outputs(copy.deepcopy(model)))


@pytest.mark.parametrize("method", ("lora", "loramoe", "alora"))
def test_mixed_batches(method):
    model = with_adapter(method)
    model.add_adapter("other", config(method))
    if method == "lora":
        patch(model)
    model.eval()

    def run(model):
        with torch.no_grad():
            return [model(ids, adapter_names=["other", "default"]).logits for ids in (IDS[:, :2], IDS.repeat(1, 4))]

    for value in (0.5, 2.0):
        for layer in layers(model):
            layer.scaling["default"] = torch.tensor(value)
        first = run(model)
        for layer in layers(model):
            layer.scaling["default"].fill_(-value)
        second = run(model)
        assert all(torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
        for actual, wanted in zip(second, run(with_numbers(model)), strict=True):
            assert relative_error(actual, wanted) < 1e-5


@pytest.mark.parametrize("prepared", (False, True))
@pytest.mark.parametrize("first", (False, True), ids=("patch last", "patch first"))
def test_swapping_in_place_equals_peft(first, prepared, tmp_path):
    for name, r, alpha in (("a", 4, 8), ("b", 2, 32)):
        torch.manual_seed(r)
        get_peft_model(tiny_llama(), config("lora", r=r, lora_alpha=alpha)).save_pretrained(tmp_path / name)

    def run(fused):
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a", is_trainable=True).eval()
        if fused and first:
            patch(model)
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=4, config=model.peft_config)
        if fused and not first:
            patch(model)
        before = outputs(model)
        hotswap_adapter(model, tmp_path / "b", adapter_name="default", torch_device="cpu")
        return before, outputs(model)

    for actual, wanted in zip(run(True), run(False), strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize("method", ("lora", "loramoe", "loki*"))  # ALoRA's needs its model around it
def test_a_compiled_layer_is_not_compiled_again_for_a_new_value(method):
    model = with_adapter(method)
    layer = layers(model)[0]
    layer.scaling["default"] = torch.tensor(0.5)
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    compiled, x = torch.compile(layer, backend=graphs), torch.randn(2, 3, layer.in_features)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            compiled(x)
            count = graphs.frame_count
            for value in (0.7, -2.0, 0.1):
                layer.scaling["default"].fill_(value)
                assert relative_error(compiled(x), copy.deepcopy(layer)(x)) < 1e-5
            assert graphs.frame_count == count
