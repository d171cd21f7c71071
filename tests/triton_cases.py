"""The Triton kernels under the interpreter, on CPU tensors; run by test_triton.py with TRITON_INTERPRET=1.

float32 and float16: the interpreter's bfloat16 products are wrong, and bfloat16 takes the same lines.
"""

import dataclasses
import importlib

import pytest
import shared_input_cases as shared
import torch

from gci_kernels import hardware, ops
from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.bench import tune
from gci_kernels.hardware import gpus, tuned
from gci_kernels.ops import launching
from gci_kernels.ops.bottleneck import aten, config, philox, stages
from gci_kernels.ops.bottleneck import triton as kernels
from gci_kernels.ops.gate import reference
from gci_kernels.ops.gate import triton as gate
from gci_kernels.proof import verify

# The package's `expand` is the function.
expand_module = importlib.import_module("gci_kernels.ops.bottleneck.triton.expand")
pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.float16)
# tokens, depth, width, rank
SHAPES = [
    (1, 5, 1, 1), (7, 33, 20, 3), (130, 67, 50, 16), (130, 600, 259, 40), (64, 128, 128, 16), (3, 16, 300, 130),
    (0, 20, 7, 4), (3, 0, 5, 2), (600, 21, 19, 3),
]  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_interpreter_runs():
    assert launching.INTERPRETED


def check(actual, truth, plain, dtype):
    """No worse than the same computation in plain PyTorch, given as `plain`."""
    assert actual.shape == truth.shape and actual.dtype == dtype
    assert relative_error(actual, truth) <= error_bound(relative_error(plain, truth), dtype)


def gapped(rows, cols, dtype):
    """Rows inside a wider tensor of NaN: what is read beside them shows."""
    wide = torch.full((rows, cols + 5), float("nan"), dtype=dtype)
    wide[:, 2 : cols + 2] = torch.randn(rows, cols)
    return wide[:, 2 : cols + 2]


def transposed(rows, cols, dtype):
    return gapped(cols, rows, dtype).t()


def spread(rows, cols, dtype):
    """No stride is 1."""
    return torch.randn(rows, cols, 2).to(dtype)[..., 1]


LAYOUTS = {"gapped": gapped, "transposed": transposed, "spread": spread}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("tokens", "depth", "width", "rank"), SHAPES)
def test_project(tokens, depth, width, rank, layout, dtype):
    x = gapped(tokens, depth, dtype)
    for m_dtype in {torch.float32, dtype}:
        m = LAYOUTS[layout](depth, rank, m_dtype)
        truth = x.double() @ m.to(dtype).double()
        check(kernels.project(x, m), truth, x.float() @ m.to(dtype).float(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("tokens", "depth", "width", "rank"), SHAPES)
def test_expand(tokens, depth, width, rank, layout, dtype):
    x, w, u = gapped(tokens, depth, dtype), LAYOUTS[layout](depth, width, dtype), gapped(tokens, rank, dtype)
    m, bias = LAYOUTS[layout](rank, width, torch.float32), torch.randn(2 * width)[::2]
    adapter = u.double() @ m.to(dtype).double()
    base = x.double() @ w.double()
    check(kernels.expand(u, m, x, w, None), adapter + base, aten.expand(u, m, x, w, None), dtype)
    plain = aten.expand(u, m, x, w, bias.to(dtype))
    check(kernels.expand(u, m.to(dtype), x, w, bias.to(dtype)), adapter + base + bias.to(dtype).double(), plain, dtype)
    check(kernels.expand(u, m, x, None, None), adapter, aten.expand(u, m, x, None, None), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("tokens", "depth", "width", "rank"), SHAPES)
def test_reduce(tokens, depth, width, rank, layout, dtype):
    u, y = LAYOUTS[layout](tokens, rank, dtype), gapped(tokens, width, dtype)
    check(kernels.reduce(u, y), u.double().t() @ y.double(), u.float().t() @ y.float(), torch.float32)


def dropped(x, p, seed):
    """x in float64 after dropout, and after it in x's own dtype, as a masked copy would hold it."""
    keep = philox.keep_mask(*x.shape, p, seed, x.device)
    scaled = x.float() / (1 - p)
    return (x.double() / (1 - p)).where(keep, 0), scaled.where(keep, 0).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", (0.6, 1.0))
@pytest.mark.parametrize(("tokens", "depth", "width", "rank"), SHAPES)
def test_project_and_reduce_under_dropout(tokens, depth, width, rank, columns, dtype):
    """The first columns see the masked operand, the others the operand itself; the mask is philox.py's to the bit."""
    drop = philox.Dropout(0.3, 2**40 + 7, max(1, int(columns * rank)))
    x, m = gapped(tokens, depth, dtype), transposed(depth, rank, torch.float32)
    exact, rounded = dropped(x, drop.p, drop.seed)
    m64, c = m.to(dtype).double(), drop.columns
    truth = torch.cat((exact @ m64[:, :c], x.double() @ m64[:, c:]), 1)
    plain = torch.cat((rounded.float() @ m64[:, :c].float(), x.float() @ m64[:, c:].float()), 1)
    check(kernels.project(x, m, drop), truth, plain, torch.float32)
    u = gapped(tokens, rank, dtype)
    truth = torch.cat((u.double().t()[:c] @ exact, u.double().t()[c:] @ x.double()))
    plain = torch.cat((u.float().t()[:c] @ rounded.float(), u.float().t()[c:] @ x.float()))
    check(kernels.reduce(u, x, drop), truth, plain, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", (0.6, 1.0))
@pytest.mark.parametrize(("tokens", "depth", "width", "rank"), SHAPES)
def test_expand_under_dropout(tokens, depth, width, rank, columns, dtype):
    drop = philox.Dropout(0.3, 2**40 + 7, max(1, int(columns * rank)))
    x, w, u, m = (gapped(*shape, dtype) for shape in ((tokens, depth), (depth, width), (tokens, rank), (rank, width)))
    c, keep = drop.columns, philox.keep_mask(tokens, width, drop.p, drop.seed, x.device)

    def formula(u, m, x, w):
        masked = torch.where(keep, (u[:, :c] @ m[:c]) * drop.scale, 0)
        return masked + u[:, c:] @ m[c:] + x @ w

    check(
        kernels.expand(u, m, x, w, None, drop), formula(*(t.double() for t in (u, m, x, w))), formula(u, m, x, w), dtype
    )


@pytest.mark.parametrize(("tokens", "width", "rank"), [(130, 80, 3), (300, 1056, 16), (64, 32, 33), (1, 16, 1)])
def test_project_reduce(monkeypatch, tokens, width, rank):
    """Also for sizes at which two readings are fewer bytes, and with shares of the tokens that end inside a block."""
    block_r = max(16, 1 << (rank - 1).bit_length())
    config_ = config.ReduceConfig(16, block_r, 64, splits=3, num_warps=4, num_stages=1)
    monkeypatch.setitem(tuned._trying, "project_reduce", config_)
    for layout in LAYOUTS.values():
        y, u = gapped(tokens, width, torch.float16), layout(tokens, rank, torch.float16)
        m = layout(width, rank, torch.float32)
        du, dm = kernels.project_reduce(y, m, u)
        rounded = m.to(y.dtype)
        check(du, y.double() @ rounded.double(), y.float() @ rounded.float(), torch.float32)
        check(dm, u.double().t() @ y.double(), u.float().t() @ y.float(), torch.float32)


def test_project_reduce_is_part_of_backward(monkeypatch):
    """Where the configuration wants one reading of dY: forward and every gradient of the whole op."""
    calls, config_ = [], config.ReduceConfig(64, 16, 64, splits=2, num_warps=4, num_stages=1)
    monkeypatch.setitem(tuned._trying, "project_reduce", config_)
    project_reduce = stages.project_reduce
    monkeypatch.setattr(stages, "project_reduce", lambda *args: calls.append(1) or project_reduce(*args))
    case = verify.Case("loramoe", 200, 48, 150, 2, experts=3)
    tensors = verify.make_inputs(case, torch.float16, "cpu")
    truth = verify.run_case(case, verify.widened(tensors), "reference")
    plain, actual = (verify.run_case(case, tensors, impl) for impl in ("reference", "triton"))
    assert calls == [1]
    for name in truth:
        bound = error_bound(relative_error(plain[name], truth[name]), torch.float16)
        assert relative_error(actual[name], truth[name]) <= bound, name


@pytest.mark.parametrize("by_rows", (True, False))
@pytest.mark.parametrize(("tokens", "depth", "width", "rank"), [(130, 96, 272, 3), (70, 208, 144, 40)])
def test_expand_by_descriptors(monkeypatch, tokens, depth, width, rank, by_rows):
    """Aligned rows go through tensor descriptors, forward (w by columns) and dX (by rows), within wider tensors too.

    By the persistent kernel, with fewer programs than tiles, and under dropout by the other one.
    """
    made, descriptors, persistent = [], expand_module._descriptors, expand_module.expand_persistent
    monkeypatch.setattr(expand_module, "_descriptors", lambda *args: made.append("masked") or descriptors(*args))
    monkeypatch.setattr(expand_module, "expand_persistent", lambda *args: made.append("plain") or persistent(*args))
    monkeypatch.setattr(gpus, "processors", lambda device: 4)
    small = config.ExpandConfig(64, 64, 32, 2, 4, 2, block_r=64, descriptors=True, persistent=True)
    monkeypatch.setitem(tuned._trying, "expand", small)
    wide = torch.randn(tokens, depth + 24).half()
    x = wide[:, 8 : depth + 8]
    w = torch.randn(depth, width).half() if by_rows else torch.randn(width, depth).half().t()
    u, m, bias = torch.randn(tokens, rank).half(), torch.randn(rank, width), torch.randn(width).half()
    truth = u.double() @ m.half().double() + x.double() @ w.double() + bias.double()
    chosen = config.choose_expand_config(tokens, depth, width, rank, x.dtype, "sm_90")
    assert chosen.descriptors and chosen.persistent
    check(kernels.expand(u, m, x, w, bias), truth, aten.expand(u, m, x, w, bias), torch.float16)
    truth -= bias.double()
    check(kernels.expand(u, m, x, w, None), truth, aten.expand(u, m, x, w, None), torch.float16)
    monkeypatch.setitem(tuned._trying, "expand", dataclasses.replace(small, persistent=False))
    drop = philox.Dropout(0.5, 7, rank)
    masked = (u.double() @ m.half().double() * 2).where(philox.keep_mask(tokens, width, 0.5, 7, x.device), 0)
    plain = masked.half() + x @ w
    check(kernels.expand(u, m, x, w, None, drop), masked + x.double() @ w.double(), plain, torch.float16)
    assert made == ["plain", "plain", "masked"]
    x = wide[:, 7 : depth + 7]  # rows that begin between multiples of 16 bytes
    truth = u.double() @ m.half().double() + x.double() @ w.double()
    check(kernels.expand(u, m, x, w, None), truth, aten.expand(u, m, x, w, None), torch.float16)
    assert made == ["plain", "plain", "masked"]


@pytest.mark.parametrize("group", (1, 2, 8))
@pytest.mark.parametrize(("tokens", "width", "depth"), [(40, 70, 48), (81, 33, 50)])
def test_every_tile_of_expand_is_visited_once(monkeypatch, group, tokens, width, depth):
    """Small tiles: many rows and columns of them, the last group of rows not full, several steps of the rank."""
    monkeypatch.setitem(tuned._trying, "expand", config.ExpandConfig(16, 16, 16, group, 4, 1, block_r=16))
    u, m, x, w = (torch.randn(s) for s in ((tokens, 35), (35, width), (tokens, depth), (depth, width)))
    truth = u.double() @ m.double() + x.double() @ w.double()
    check(kernels.expand(u, m, x, w, None), truth, aten.expand(u, m, x, w, None), torch.float32)


@pytest.mark.parametrize("splits", (1, 3, 8))
def test_splits_cover_the_sum_once(monkeypatch, splits):
    """Also where the last programs of a sum get nothing: 70 numbers in blocks of 16 are too few for 8."""
    project_config = config.ProjectConfig(16, 16, 16, splits, 4, 1)
    reduce_config = config.ReduceConfig(16, 16, 16, splits, 4, 1)
    monkeypatch.setitem(tuned._trying, "project", project_config)
    monkeypatch.setitem(tuned._trying, "reduce", reduce_config)
    x, m = torch.randn(33, 70), torch.randn(70, 19)
    check(kernels.project(x, m), x.double() @ m.double(), x @ m, torch.float32)
    u, y = torch.randn(70, 19), torch.randn(70, 33)
    check(kernels.reduce(u, y), u.double().t() @ y.double(), u.t() @ y, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ("lora", "loramoe", "alora"))
def test_layers_that_are_given_the_same_x(method, dtype):
    x, layers = shared.layers_of(method, (1, 70), dtype, in_features=96)
    wide = [[None if t is None else t.double() for t in layer] for layer in layers]
    truth = shared.gradients(shared.run_apart, method, x.double(), wide, "reference")
    plain = shared.gradients(shared.run_apart, method, x, layers, "reference")
    actual = shared.gradients(shared.run, method, x, layers, "triton")
    for name, value in truth.items():
        if value is not None:
            check(actual[name], value, plain[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_twice(dtype):
    u, m, x, w = (torch.randn(s).to(dtype) for s in ((70, 16), (16, 90), (70, 600), (600, 90)))
    left, right = torch.randn(300, 16).to(dtype), torch.randn(300, 130).to(dtype)
    assert config.choose_project_config(70, 600, 90, dtype, "sm_90").splits > 1
    assert config.choose_reduce_config(300, 16, 130, dtype, "sm_90").splits > 1
    for call in (
        lambda: kernels.project(x, w),
        lambda: kernels.expand(u, m, x, w, None),
        lambda: kernels.reduce(left, right),
        lambda: kernels.dropout(x, 0.3, 5),
    ):
        assert torch.equal(call(), call())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (7, 67), (130, 256), (3, 1030), (0, 5)])
@pytest.mark.parametrize(("seed", "p"), [(0, 0.05), (1, 0.9), (2**31, 0.05), (2**61 + 12345, 0.9)])
def test_dropout_is_the_definition(dtype, rows, cols, seed, p):
    x = torch.rand(rows, cols).to(dtype) + 1  # no zeros of its own
    keep = philox.keep_mask(rows, cols, p, seed, x.device)
    out = kernels.dropout(x, p, seed)
    assert torch.equal(out != 0, keep)
    assert torch.equal(out, aten.dropout(x, p, seed))
    assert torch.equal(kernels.dropout(torch.stack((x, x), -1)[..., 0], p, seed), out)
    strided = x.t().contiguous().t()
    assert torch.equal(kernels.dropout_(strided, p, seed), out) and torch.equal(strided, out)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (7, 67), (130, 256), (3, 1030), (0, 5), (5, 0)])
@pytest.mark.parametrize(("seed", "p"), [(0, 0.05), (2**61 + 12345, 0.9)])
def test_the_mask_in_bits_is_the_definition(rows, cols, seed, p):
    keep = philox.keep_mask(rows, cols, p, seed, torch.device("cpu"))
    bits = kernels.dropout_bits(rows, cols, p, seed, keep.device)
    assert bits.shape == (rows, -(-cols // 32)) and bits.dtype == torch.int32
    assert torch.equal(philox.keep_mask(rows, cols, p, bits, keep.device), keep)


@pytest.mark.parametrize("impl", ("triton", "aten"))
def test_a_mask_is_made_once_for_forward_and_backward(monkeypatch, impl):
    """By Triton's products; also a second derivative, which is the formula's, sees the same one."""
    made, make = [], kernels.dropout_bits
    monkeypatch.setattr(kernels, "dropout_bits", lambda *args: made.append(1) or make(*args))
    x, A, B = (torch.randn(s, requires_grad=True) for s in ((40, 48), (4, 48), (20, 4)))
    weight = torch.randn(20, 48)

    def gradients(impl):
        torch.manual_seed(3)
        y = ops.lora_linear(x, weight, None, A, B, scaling=1.0, dropout_p=0.5, impl=impl)
        first = torch.autograd.grad(y.square().sum(), (x, A, B), create_graph=True)
        return [*first, *torch.autograd.grad(first[0].square().sum(), (A, B))]

    actual = gradients(impl)
    assert len(made) == (1 if impl == "triton" else 0)
    for mine, formula in zip(actual, gradients("reference"), strict=True):
        assert relative_error(mine, formula) < 1e-5


def test_the_mask_s_operator():
    arguments = (torch.tensor(5), 7, 67, 0.3)
    torch.library.opcheck(torch.ops.gci_kernels.dropout_bits.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_reads_its_seed_where_it_lies(dtype):
    """The kernels have the seed's address: a value that is written there later counts, as in a replayed CUDA graph."""
    x, m, u = torch.randn(33, 40).to(dtype), torch.randn(40, 3).to(dtype), torch.randn(33, 3).to(dtype)
    n, w, seed = torch.randn(3, 24).to(dtype), torch.randn(40, 24).to(dtype), torch.tensor(0)

    def results(seed):
        drop = philox.Dropout(0.3, seed, 2)
        yield kernels.dropout(x, 0.3, seed)
        yield kernels.project(x, m, drop)
        yield kernels.expand(u, n, x, w, None, drop)
        yield kernels.reduce(u, x, drop)

    before = list(results(seed))
    seed.fill_(2**61 + 5)
    for changed, number, old in zip(results(seed), results(2**61 + 5), before, strict=True):
        assert torch.equal(changed, number) and not torch.equal(changed, old)


def test_compiled_dropout_draws_a_mask_for_each_call():
    x, A, B = torch.randn(40, 48), torch.randn(4, 48), torch.randn(20, 4, requires_grad=True)

    def function(x):
        return ops.lora_linear(x, None, None, A, B, scaling=1.0, dropout_p=0.5, impl="triton")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    expected = function(x), function(x)
    torch.manual_seed(3)
    actual = compiled(x), compiled(x)
    assert not torch.equal(*expected)
    assert all(map(torch.equal, actual, expected))


def test_dropout_hides_what_it_drops():
    x = torch.full((4, 64), float("nan"))
    assert torch.equal(kernels.dropout(x, 0.5, 3).isnan(), philox.keep_mask(4, 64, 0.5, 3, x.device))


def gate_truth(projected, du, dgates, experts, top_k, scaling, dtype=torch.float64):
    """u, gates, dprojected from autograd through the formula."""
    leaf = projected.to(dtype).requires_grad_()
    width = projected.shape[1] - experts
    u, gates = reference.gate(leaf[:, :width], leaf[:, width:], top_k)
    u = u * scaling
    (dprojected,) = torch.autograd.grad((u, gates), leaf, (du.to(dtype), dgates.to(gates.dtype)))
    return u.detach(), gates.detach(), dprojected


@pytest.mark.parametrize(("projected_dtype", "dtype"), [
    (torch.float32, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.float16),
])  # fmt: skip
@pytest.mark.parametrize(
    ("tokens", "experts", "r", "top_k"),
    [(130, 8, 4, 8), (1, 1, 16, 1), (7, 5, 3, 2), (33, 64, 1, 7), (5, 256, 40, 256), (3, 200, 2, 1), (0, 4, 2, 4)],
)
def test_gate(projected_dtype, dtype, tokens, experts, r, top_k):
    projected = gapped(tokens, experts * r + experts, projected_dtype)
    du, dgates = gapped(tokens, experts * r, projected_dtype), gapped(tokens, experts, torch.float32)
    truth = gate_truth(projected, du, dgates, experts, top_k, 2.0)
    plain = gate_truth(projected, du, dgates, experts, top_k, 2.0, torch.float32)
    u, gates = gate.forward(projected, experts, top_k, 2.0, dtype)
    dprojected, u_again = gate.backward(du, dgates, projected, experts, top_k, 2.0, dtype)
    check(u, truth[0], plain[0].to(dtype), dtype)
    check(gates, truth[1], plain[1], torch.float32)
    check(dprojected, truth[2], plain[2].to(dtype), dtype)
    assert torch.equal(u, u_again)
    without = gate_truth(projected, du, torch.zeros_like(dgates), experts, top_k, 2.0)[2]
    actual = gate.backward(du, None, projected, experts, top_k, 2.0, dtype)[0]
    assert relative_error(actual, without) <= 4 * torch.finfo(dtype).eps


def test_gate_ties_go_to_the_lower_expert():
    _, gates = gate.forward(torch.ones(3, 4 * 2 + 4), 4, 2, 1.0, torch.float32)
    assert gates.tolist() == [[0.5, 0.5, 0.0, 0.0]] * 3
    logits = torch.randint(3, (40, 6)).float()  # many ties at the edge
    projected = torch.cat((torch.ones(40, 6), logits), dim=1)
    for top_k in range(1, 7):
        _, gates = gate.forward(projected, 6, top_k, 1.0, torch.float32)
        expected = reference.gates(logits, top_k)
        assert torch.equal(gates != 0, expected != 0) and relative_error(gates, expected) < 1e-6


def test_gate_of_extreme_logits_stays_finite():
    logits = torch.tensor([[1e4, -1e4, 0, 1e4], [-3e38, 3e38, 0, 1], [-100, -101, -102, -90]])
    projected = torch.cat((torch.ones(3, 4), logits), dim=1)
    u, gates = gate.forward(projected, 4, 4, 1.0, torch.float32)
    assert relative_error(gates, logits.double().softmax(-1)) < 1e-6
    assert gate.backward(torch.ones_like(u), torch.ones_like(gates), projected, 4, 4, 1.0, u.dtype)[0].isfinite().all()


@pytest.mark.parametrize("top_k", (4, 2))
@pytest.mark.parametrize("where", (0, 3, 8, 11))
def test_gate_carries_nan(where, top_k):
    projected = torch.ones(2, 12)
    projected[:, 8:10] = 2  # with top_k = 2, the first two experts
    projected[0, where] = float("nan")
    u, gates = gate.forward(projected, 4, top_k, 1.0, torch.float32)
    assert u[0].isnan().any() and not u[1].isnan().any()
    assert gates[0].isnan().any() == (where >= 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", verify.CASES, ids=str)
def test_whole_op(case, dtype):
    """Forward and every gradient through impl="triton", dropout included."""
    tensors = verify.make_inputs(case, dtype, "cpu")
    truth = verify.run_case(case, verify.widened(tensors), "reference")
    plain, actual = (verify.run_case(case, tensors, impl) for impl in ("reference", "triton"))
    for name in truth:
        assert relative_error(actual[name], truth[name]) <= error_bound(relative_error(plain[name], truth[name]), dtype)


PRODUCTS = ["project", "expand", "expand", "project", "reduce", "reduce"]  # y, dX; dU and dB; dA


@pytest.mark.parametrize(("sizes", "names"), [((4, 0), PRODUCTS), ((4, 2), PRODUCTS), ((0, 0), ["row_linear"] * 2)])
def test_tuning_runs_every_launch(monkeypatch, tmp_path, sizes, names):
    """Small shapes and few values; the clock prefers narrow tiles."""
    monkeypatch.setenv("GCI_CACHE", str(tmp_path))
    monkeypatch.setattr(hardware.records, "gpu", lambda device: ("an interpreter", "sm_90"))
    few = {"reduce": dict(block_t=(16,)), "expand": dict(group=(3,)), "row_linear": dict(group=(3,))}
    for name, (kernel, launch) in hardware.kernels.LAUNCHES.items():
        launch = dataclasses.replace(launch, candidates=few.get(name, dict(num_warps=(2,))))
        monkeypatch.setitem(hardware.kernels.LAUNCHES, name, (kernel, launch))
    clock = iter(range(1000, 0, -1))
    rank, experts = sizes
    shape = hardware.Shape(40, 32, 48, rank, experts, experts, rows=0 if rank else 4)
    found = list(tune.run([shape, shape], torch.float16, torch.device("cpu"), lambda fn: float(next(clock))))
    assert [each.launch.name for each in found] == names
    assert all(each.tried == 1 and not each.left_out for each in found), found
