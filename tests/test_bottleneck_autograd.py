"""The bottleneck's derivatives: gradcheck, second derivatives, what its operators promise, torch.compile."""

import pytest
import torch
from bottleneck_cases import FUSED, make

from gci_kernels import native, ops
from gci_kernels.accuracy import relative_error

pytestmark = pytest.mark.usefixtures("poisoned")


def test_reference_gradcheck():
    for experts, top_k in ((0, None), (4, None), (4, 2)):
        arguments = [
            v.requires_grad_() for v in make((3,), in_features=5, out_features=4, r=2, experts=experts).values()
        ]
        options = {"top_k": top_k} if experts else {}
        function = ops.loramoe_linear if experts else ops.lora_linear
        assert torch.autograd.gradcheck(lambda *a: function(*a, scaling=2.0, impl="reference", **options), arguments)  # noqa: B023


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
def test_second_derivatives_are_those_of_the_formula(impl, dropout_p):
    leaves = {k: v.requires_grad_() for k, v in make().items()}

    def second(impl: str) -> list[torch.Tensor]:
        torch.manual_seed(1)
        y, gates = ops.loramoe_linear(**leaves, scaling=2.0, dropout_p=dropout_p, impl=impl)
        first = torch.autograd.grad(y.square().sum() + gates.square().sum(), leaves.values(), create_graph=True)
        return torch.autograd.grad(sum(d.square().sum() for d in first), leaves.values())

    for actual, expected in zip(second(impl), second("reference"), strict=True):
        assert relative_error(actual, expected) < 1e-9


ATEN, MIXED, NATIVE = (
    "aten/aten/aten/aten/aten",
    "native/native/aten/native/native",
    "native/native/native/native/native",
)
PLANS = [(ATEN, torch.float32), (MIXED, torch.float32), ("aten/native/aten/aten/native", torch.float64)]
if native.extension().has_bf16_products():  # whose sums leave in another dtype than x's
    PLANS += [(NATIVE, torch.bfloat16), (MIXED, torch.bfloat16)]


@pytest.mark.parametrize(("plan", "dtype"), PLANS)
@pytest.mark.parametrize("experts", (0, 8))
@pytest.mark.parametrize("with_weight", (True, False))
@pytest.mark.parametrize("with_dropout", (True, False))
@pytest.mark.parametrize("needs_grad", (True, False))
def test_opcheck_forward(plan, dtype, experts, with_weight, with_dropout, needs_grad):
    a = make((5,), in_features=12, out_features=9, experts=experts, dtype=dtype)
    tensors = [a["x"], a["weight"] if with_weight else None, a["bias"] if with_weight else None, a["A"], a["B"]]
    tensors = [None if t is None else t.requires_grad_(needs_grad) for t in [*tensors, a.get("router")]]
    seed, p = (torch.tensor(3), 0.5) if with_dropout else (None, 0.0)
    name, settings = ("gate", [experts]) if experts else ("identity", [])
    arguments = (*tensors, None, None, seed, name, settings, 2.0, p, plan)
    torch.library.opcheck(torch.ops.gci_kernels.bottleneck.default, arguments)


@pytest.mark.parametrize(("plan", "dtype"), PLANS)
@pytest.mark.parametrize("experts", (0, 8))
@pytest.mark.parametrize("seed", (None, torch.tensor(3)))
@pytest.mark.parametrize("needs", [[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]])
def test_opcheck_backward(plan, dtype, experts, seed, needs):
    a = make((5,), in_features=12, out_features=9, experts=experts, dtype=dtype)
    name, settings = ("gate", [experts]) if experts else ("identity", [])
    p, tensors = 0.0 if seed is None else 0.5, (a["A"], a["B"], a.get("router"), None, None, seed)
    options = (name, settings, 2.0, p, plan)
    _, *kept, shown = torch.ops.gci_kernels.bottleneck(a["x"], a["weight"], None, *tensors, *options)
    dshown = torch.randn_like(shown) if experts else None
    dy, needs = torch.randn(5, 9, dtype=dtype), [bool(need) for need in needs]
    arguments = (dy, dshown, a["x"], a["weight"], *tensors, *kept, *options, needs)
    torch.library.opcheck(torch.ops.gci_kernels.bottleneck_backward.default, arguments)


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
def test_compile_fullgraph(dropout_p):
    def step(x, weight, A, B, router):
        y, gates = ops.loramoe_linear(x.sin(), weight, None, A, B, router, scaling=2.0, dropout_p=dropout_p)
        return y.cos().sum() + gates.square().sum()

    arguments = {k: v for k, v in make(dtype=torch.float32).items() if k != "bias"}
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (16, 24, 9):
        x = torch.randn(tokens, 67)
        leaves = [v.detach().clone().requires_grad_() for v in (arguments | {"x": x}).values()]
        torch.manual_seed(0)
        expected = torch.autograd.grad(step(*leaves), leaves)
        torch.manual_seed(0)
        actual = torch.autograd.grad(compiled(*leaves), leaves)
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
