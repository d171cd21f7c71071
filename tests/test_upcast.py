"""16-bit products through float32 (ops/upcast.py): against float64, rounded once, in bounded memory, and when taken."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gci_kernels import ops
from gci_kernels.accuracy import relative_error
from gci_kernels.ops import upcast
from gci_kernels.ops.bottleneck import choose_plan
from gci_kernels.ops.bottleneck import upcast as stages
from gci_kernels.ops.bottleneck.plan import Plan
from gci_kernels.ops.row_linear import choose_form
from gci_kernels.ops.row_linear import upcast as row_linear
from gci_kernels.proof.verify import CASES, check_case, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned")
PLAN = Plan("upcast", "aten", "upcast", "upcast", "aten")
halves = pytest.mark.parametrize("dtype", upcast.HALVES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """Small operands in one block, as they are, and in many: of rows, of columns, and with a rest in both."""
    if request.param == "many blocks":
        monkeypatch.setattr(upcast, "_BLOCK", 700)
        monkeypatch.setattr(upcast, "_ROWS", 48)


@halves
@pytest.mark.parametrize("case", [case for case in CASES if not case.step], ids=str)
def test_outputs_and_gradients(case, dtype, blocks):
    """Every adapter, with dropout, odd sizes and one token: at most twice plain PyTorch's error."""
    for check in check_case(case, dtype, "upcast", "cpu"):
        assert check.passed, check


@halves
@pytest.mark.parametrize("turned", (False, True), ids=("W.T", "W"))
def test_a_sum_is_rounded_once(dtype, turned, blocks):
    g = torch.Generator().manual_seed(0)
    x, w, u, m = (torch.randn(*shape, generator=g).to(dtype) for shape in ((70, 90), (90, 50), (70, 4), (4, 50)))
    w, bias = w.t().contiguous().t() if turned else w, torch.randn(50, generator=g).to(dtype)
    y = torch.randn(70, 50, generator=g).to(dtype)
    truth = u.double() @ m.double() + x.double() @ w.double() + bias.double()
    for actual, expected in (
        (stages.expand(u, m, x, w, bias), truth),
        (stages.expand_onto(y.clone(), u, m, x, w, bias), truth + y.double()),
        (stages.expand(u, m, x, None, None), u.double() @ m.double()),
        (stages.expand_onto(y.clone(), u, m, x, None, None), y.double() + u.double() @ m.double()),
    ):
        assert actual.dtype == dtype
        assert relative_error(actual, expected) <= 1.01 * relative_error(expected.to(dtype), expected)
    assert stages.project(x, w).dtype == stages.reduce(u, x).dtype == torch.float32
    assert relative_error(stages.project(x, w), x.double() @ w.double()) < 1e-6
    assert relative_error(stages.reduce(u, x), u.double().t() @ x.double()) < 1e-6


class Largest(TorchDispatchMode):
    """The most elements that a float32 tensor has, of all that are made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.elements = max(self.elements, out.numel())
        return out


def test_scratch_is_bounded(monkeypatch):
    monkeypatch.setattr(upcast, "_BLOCK", 4096)
    x, w, u, m = (torch.randn(*shape).bfloat16() for shape in ((500, 200), (200, 300), (500, 2), (2, 300)))
    with Largest() as largest:
        stages.expand(u, m, x, w, None)
    assert 2048 < largest.elements <= 4096
    dy, weight, active = (torch.randn(*shape).bfloat16() for shape in ((500, 300), (300, 200), (9, 200)))
    positions = torch.randperm(300)[:9]
    for call in (
        lambda: row_linear.forward(x, weight, None, active, positions, "upcast"),
        lambda: row_linear.dx(dy, weight, active, positions, dy[:, positions], "upcast"),
    ):
        with Largest() as largest:
            call()
        assert 2048 < largest.elements <= 4096


def test_more_rows_than_a_block_holds_numbers(monkeypatch):
    """A row longer than a block is one block of its own."""
    monkeypatch.setattr(upcast, "_BLOCK", 8)
    x, w = torch.randn(5, 33).bfloat16(), torch.randn(33, 7).bfloat16()
    nothing = torch.zeros(5, 1).bfloat16(), torch.zeros(1, 7).bfloat16()
    assert relative_error(stages.expand(*nothing, x, w, None), x.double() @ w.double()) < 4e-3


@halves
def test_same_bits_under_autocast(dtype, monkeypatch):
    """The float32 products inside are not rounded again."""
    monkeypatch.setitem(upcast.LIBRARY_MULTIPLIES, dtype, False)
    for case in (CASES[2], CASES[5], CASES[7]):
        tensors, op = make_inputs(case, dtype, "cpu"), getattr(ops, f"{case.method}_linear")
        options = {} if case.method == "loki" else {"scaling": 2.0}
        options |= {"num_heads": case.heads} if case.method == "alora" else {}
        expected = op(**tensors, **options)
        with torch.autocast("cpu", dtype=dtype):
            actual = op(**tensors, **options)
        for a, e in zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]:
            assert a.dtype == e.dtype and torch.equal(a, e)


@halves
@pytest.mark.parametrize("tokens", (0, 1))
def test_hardly_any_tokens(dtype, tokens):
    a = {name: t[:tokens] if name == "x" else t for name, t in make_inputs(CASES[0], dtype, "cpu").items()}
    leaves = {name: t.clone().requires_grad_() for name, t in a.items()}
    y = ops.lora_linear(**leaves, scaling=2.0, impl="upcast")
    y.sum().backward()
    assert y.shape == (tokens, 45) and all(leaf.grad.isfinite().all() for leaf in leaves.values())


@pytest.mark.parametrize("experts", (0, 8))
@pytest.mark.parametrize("seed", (None, torch.tensor(3)))
def test_opcheck(experts, seed):
    case = next(case for case in CASES if case.method == ("loramoe" if experts else "lora"))
    a = {name: t.requires_grad_() for name, t in make_inputs(case, torch.bfloat16, "cpu").items()}
    name, settings = ("gate", [experts]) if experts else ("identity", [])
    tensors, p = (a["A"], a["B"], a.get("router"), None, None, seed), 0.0 if seed is None else 0.5
    options = (name, settings, 2.0, p, PLAN.key)
    inputs = a["x"], a["weight"], a["bias"], *tensors
    torch.library.opcheck(torch.ops.gci_kernels.bottleneck.default, (*inputs, *options))
    with torch.no_grad():
        y, *kept, shown = torch.ops.gci_kernels.bottleneck(a["x"], a["weight"], None, *tensors, *options)
    dshown = torch.randn_like(shown) if experts else None
    a, tensors = {k: t.detach() for k, t in a.items()}, tuple(t if t is None else t.detach() for t in tensors)
    arguments = (torch.randn_like(y), dshown, a["x"], a["weight"], *tensors, *kept, *options, [True] * 5 + [False])
    torch.library.opcheck(torch.ops.gci_kernels.bottleneck_backward.default, arguments)


def test_opcheck_loki():
    a = make_inputs(CASES[7], torch.bfloat16, "cpu")
    operands = a["weight"], a["bias"], a["active_weight"].float().requires_grad_(), a["positions"], a["active_bias"]
    torch.library.opcheck(torch.ops.gci_kernels.row_linear.default, (a["x"].requires_grad_(), *operands, "upcast"))


def test_compiled_as_one_graph():
    a = make_inputs(CASES[2], torch.bfloat16, "cpu")

    def call(x):
        return ops.loramoe_linear(x, **{k: t for k, t in a.items() if k != "x"}, scaling=2.0, impl="upcast")[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (130, 77):
        assert torch.equal(compiled(a["x"][:tokens]), call(a["x"][:tokens]))


# When it is taken


def taken(dtype, tokens, isa, library) -> bool:
    plan = choose_plan("auto", tokens=tokens, dtype=dtype, device_type="cpu", isa=isa, library=library)
    options = dict(share=0.1, dtype=dtype, device_type="cpu", keep=True, isa=isa, library=library)
    form = choose_form("auto", tokens=tokens, **options)
    assert (plan.expand == "upcast") == (form == "upcast") == (plan.project == "upcast") == (plan.reduce == "upcast")
    return form == "upcast"


def test_taken_where_the_library_has_no_fast_product():
    for isa in ("none", "baseline", "avx2"):
        assert [taken(torch.bfloat16, tokens, isa, False) for tokens in (1, 3, 4, 2048)] == [False, False, True, True]
    assert not taken(torch.bfloat16, 2048, "baseline", True), "an Arm processor with bfloat16 instructions"
    assert [taken(torch.bfloat16, tokens, "avx512", True) for tokens in (4, 15, 16, 2048)] == [False] * 2 + [True] * 2
    for isa in ("avx512bf16", "amx"):
        assert not taken(torch.bfloat16, 2048, isa, True)
        assert taken(torch.float16, 2048, isa, False) and not taken(torch.float16, 2048, isa, True)
    for dtype in (torch.float32, torch.float64):
        assert not taken(dtype, 2048, "avx2", False)


def test_this_processor_is_asked():
    for dtype in upcast.HALVES:
        expected = choose_plan("auto", tokens=64, dtype=dtype, device_type="cpu",
                               library=upcast.LIBRARY_MULTIPLIES[dtype])  # fmt: skip
        assert choose_plan("auto", tokens=64, dtype=dtype, device_type="cpu") == expected


def test_dropout_and_the_mixer_stay_in_cpp():
    plan = choose_plan("upcast", tokens=64, dtype=torch.bfloat16, device_type="cpu", mixer="gate")
    assert plan.key == "upcast/native/upcast/upcast/native"
    assert choose_plan("upcast", tokens=64, dtype=torch.float16, device_type="cpu") == PLAN


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_refused_where_it_has_no_meaning(dtype):
    for case in (CASES[0], CASES[2], CASES[5], CASES[7]):
        tensors, op = make_inputs(case, dtype, "cpu"), getattr(ops, f"{case.method}_linear")
        options = {} if case.method == "loki" else {"scaling": 2.0}
        options |= {"num_heads": case.heads} if case.method == "alora" else {}
        with pytest.raises(ValueError, match="impl='upcast' cannot run here: its products are for bfloat16 and"):
            op(**tensors, **options, impl="upcast")
    with pytest.raises(ValueError, match="its products are for CPU tensors, not cuda"):
        choose_plan("upcast", tokens=64, dtype=torch.bfloat16, device_type="cuda")
    q = torch.zeros(1, 3, 4).bfloat16()
    with pytest.raises(ValueError, match="impl='upcast' cannot run here: .*attention has none"):
        ops.low_rank_attention(q, q, q, num_heads=2, impl="upcast")
