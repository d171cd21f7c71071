"""Layers that are given the same x: outputs and gradients against float64, and how often they read x."""

from collections import Counter

import pytest
import torch
from bottleneck_cases import FUSED
from shared_input_cases import METHODS, gradients, layers_of, leaves_of, run, run_apart

from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.ops.bottleneck import stages

pytestmark = pytest.mark.usefixtures("poisoned")


def close(actual, expected, tolerance):
    for name, value in expected.items():
        if value is None or actual[name] is None:  # a gradient that is not formed is zero
            assert not any(each is not None and each.any() for each in (value, actual[name])), name
        else:
            assert actual[name].dtype == value.dtype and actual[name].shape == value.shape, name
            assert (actual[name] - value).norm() <= tolerance * (1 + value.norm()), name


@pytest.mark.smoke
@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(2, 65), (1, 1), (1, 7), (3, 11)], ids=str)
def test_float64_equals_the_formula(method, impl, shape):
    x, layers = layers_of(method, shape)
    close(gradients(run, method, x, layers, impl), gradients(run_apart, method, x, layers, "reference"), 1e-10)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_a_layer_that_the_loss_does_not_use(method, impl, used):
    x, layers = layers_of(method)
    actual = gradients(run, method, x, layers, impl, used)
    close(actual, gradients(run_apart, method, x, layers, "reference", used), 1e-10)
    assert all(actual[f"dA{index}"] is None for index in range(3) if index not in used)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trained", ["A", "B", "weights", "weight", "bias", "A B", "A of one", "none"])
@pytest.mark.parametrize("x_grad", (True, False))
def test_gradients_only_for_what_needs_them(method, trained, x_grad):
    x, layers = layers_of(method)

    def wanted(layer, name):
        return (layer, name) == (1, "A") if trained == "A of one" else name in trained.split()

    needs = any(wanted(i, n) for i, layer in enumerate(layers) for n, t in zip(
        ("weight", "bias", "A", "B", "weights"), layer, strict=True) if t is not None)  # fmt: skip
    if not (needs or x_grad):
        return
    how = dict(trained=wanted, x_grad=x_grad)
    actual = gradients(run, method, x, layers, "native", **how)
    close(actual, gradients(run_apart, method, x, layers, "reference", **how), 1e-10)
    assert (actual["dx"] is None) == (not x_grad)
    for index in range(3):
        for name in ("weight", "A", "B"):
            assert wanted(index, name) or actual[f"d{name}{index}"] is None, (name, index)


def test_only_the_gates_are_used():
    """The gradient of y is absent."""
    x, layers = layers_of("loramoe")
    found = []
    for function, impl in ((run, "aten"), (run_apart, "reference")):
        leaf, own = leaves_of(x, layers)
        made = function("loramoe", leaf, own, impl)
        (made[0][1].square().sum() + made[2][1].sum().square()).backward()
        found.append({"x": leaf.grad, "router": own[0][4].grad, "A": own[0][2].grad})
    close(found[0], found[1], 1e-10)


HALVES = (torch.bfloat16, torch.float16)
IMPLS = {"aten": (torch.float32, *HALVES), "native": (torch.float32, torch.bfloat16), "upcast": HALVES}
TAKEN = [(impl, dtype) for impl, dtypes in IMPLS.items() for dtype in dtypes]


@pytest.mark.parametrize(("impl", "dtype"), TAKEN, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("method", METHODS)
def test_error_at_most_twice_plain_pytorch(method, impl, dtype):
    x, layers = layers_of(method, (1, 130), dtype, in_features=96)
    wide = [[None if t is None else t.double() for t in layer] for layer in layers]
    truth = gradients(run_apart, method, x.double(), wide, "reference")
    plain = gradients(run_apart, method, x, layers, "reference")
    actual = gradients(run, method, x, layers, impl)
    for name, value in truth.items():
        if value is not None:
            bound = error_bound(relative_error(plain[name], value), dtype)
            assert relative_error(actual[name], value) <= bound, name


@pytest.mark.parametrize("adapter_dtype", (torch.float32, torch.bfloat16))
def test_adapters_in_another_dtype(adapter_dtype):
    x, layers = layers_of("loramoe", dtype=torch.bfloat16)
    for layer in layers:
        layer[2:] = [t.to(adapter_dtype) for t in layer[2:]]
    wide = [[None if t is None else t.double() for t in layer] for layer in layers]
    truth = gradients(run_apart, "loramoe", x.double(), wide, "reference")
    plain = gradients(run_apart, "loramoe", x, layers, "reference")
    actual = gradients(run, "loramoe", x, layers, "auto")
    for name, value in truth.items():
        if value is not None:
            assert actual[name].dtype == plain[name].dtype, name
            bound = error_bound(relative_error(plain[name], value), torch.bfloat16)
            assert relative_error(actual[name], value) <= bound, name


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_layouts_of_x_and_of_the_gradients(layout):
    x, layers = layers_of("lora", (6, 10))
    wide = torch.randn(6, 10, 2 * 67, dtype=torch.float64)
    x = {
        "strided": wide[..., ::2],
        "transposed": wide[..., :67].transpose(0, 1),
        "expanded": wide[:1, :1, :67].expand(6, 10, 67),
    }[layout]
    close(
        gradients(run, "lora", x, layers, "native"),
        gradients(run_apart, "lora", x.contiguous(), layers, "reference"), 1e-10,
    )  # fmt: skip


def test_second_derivatives_are_those_of_the_formula():
    x, layers = layers_of("loramoe", (1, 7))

    def second(function, impl):
        leaf, own = leaves_of(x, layers)
        leaves = [leaf, *(t for layer in own for t in layer if t is not None)]
        loss = sum(y.square().sum() + gates.square().sum() for y, gates in function("loramoe", leaf, own, impl))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(d.square().sum() for d in first), leaves)

    for actual, expected in zip(second(run, "native"), second(run_apart, "reference"), strict=True):
        assert relative_error(actual, expected) < 1e-9


def test_a_retained_graph_gives_the_same_bits_again():
    x, layers = layers_of("loramoe", dtype=torch.float32)
    leaf, own = leaves_of(x, layers)
    leaves = [leaf, *(t for layer in own for t in layer if t is not None)]
    loss = sum(y.square().sum() for y, _ in run("loramoe", leaf, own, "auto"))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(leaf, x)


def test_a_change_of_x_before_backward_is_noticed():
    x, layers = layers_of("lora")
    leaf, own = leaves_of(x, layers)
    base = leaf * 1
    made = run("lora", base, own, "aten")
    with torch.no_grad():
        base.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(y.sum() for y, _ in made).backward()


def test_outputs_may_be_changed_in_place():
    """Models clamp the outputs of q, k and v in place; that must not reach the other outputs."""
    x, layers = layers_of("lora")
    found = []
    for function, impl in ((run, "aten"), (run_apart, "reference")):
        leaf, own = leaves_of(x, layers)
        ys = [y for y, _ in function("lora", leaf, own, impl)]
        ys[1].clamp_(-0.5, 0.5)
        sum(y.square().sum() for y in ys).backward()
        found.append({"x": leaf.grad, "A": own[1][2].grad, "B": own[0][3].grad})
    close(found[0], found[1], 1e-10)


def test_autocast():
    x, layers = layers_of("loramoe", dtype=torch.float32)
    leaf, own = leaves_of(x, layers)
    with torch.autocast("cpu", torch.bfloat16):
        made = run("loramoe", leaf, own, "auto")
    assert all(y.dtype == torch.bfloat16 and gates.dtype == torch.float32 for y, gates in made)
    sum(y.float().square().sum() for y, _ in made).backward()
    assert leaf.grad.dtype == torch.float32 and all(layer[2].grad.dtype == torch.float32 for layer in own)
    truth = run_apart("loramoe", x, layers)
    assert all(relative_error(y, t) < 2e-2 for (y, _), (t, _) in zip(made, truth, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_x_is_read_once_in_each_direction(method, monkeypatch):
    """One `project` and one `reduce` of x for all layers; those of dY are each layer's own."""
    x, layers = layers_of(method)
    counts = Counter()
    for stage, wide in (("project", 0), ("reduce", 1)):
        original = getattr(stages, stage)

        def counted(plan, *args, original=original, stage=stage, wide=wide):
            counts[stage, "x" if args[wide].shape[-1] == x.shape[-1] else "dy"] += 1
            return original(plan, *args)

        monkeypatch.setattr(stages, stage, counted)
    gradients(run, method, x, layers, "aten", trained=lambda layer, name: name not in ("weight", "bias"))
    assert counts == {("project", "x"): 1, ("project", "dy"): 3, ("reduce", "x"): 1, ("reduce", "dy"): 3}


def test_backward_under_a_dispatch_mode_is_made_of_operators():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[func._schema.name] += 1
            return func(*args, **(kwargs or {}))

    x, layers = layers_of("lora")
    expected = gradients(run_apart, "lora", x, layers, "reference")
    leaf, own = leaves_of(x, layers)
    made = run("lora", leaf, own, "aten")
    g = torch.Generator().manual_seed(1)
    douts = [torch.randn(y.shape, generator=g, dtype=torch.float64) for y, _ in made]
    with Watch():
        torch.autograd.backward([y for y, _ in made], douts)
    assert seen["gci_kernels::bottleneck_backward"] == 3
    close({"dx": leaf.grad}, {"dx": expected["dx"]}, 1e-10)
