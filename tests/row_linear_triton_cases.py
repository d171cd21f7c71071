"""row_linear's Triton kernel under the interpreter, on CPU tensors; run by test_row_linear_triton.py.

float32 and float16: the interpreter's bfloat16 products are wrong, and bfloat16 takes the same lines.
"""

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from gci_kernels import ops
from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.hardware import tuned
from gci_kernels.ops import launching
from gci_kernels.ops.row_linear import reference
from gci_kernels.ops.row_linear import triton as row_linear

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.float16)
# tokens, in, out, k
SHAPES = [
    (1, 5, 1, 1), (7, 33, 20, 3), (130, 67, 45, 9), (130, 64, 48, 48), (7, 48, 300, 30), (3, 300, 16, 1), (0, 20, 7, 4),
    (130, 600, 259, 26),
]  # fmt: skip


def test_the_interpreter_runs():
    assert launching.INTERPRETED


def gapped(rows, cols, dtype):
    """Rows inside a wider tensor of NaN: what is read beside them shows."""
    wide = torch.full((rows, cols + 5), float("nan"), dtype=dtype)
    wide[:, 2 : cols + 2] = torch.randn(rows, cols)
    return wide[:, 2 : cols + 2]


def spread(rows, cols, dtype):
    """No stride is 1."""
    return torch.randn(rows, cols, 2).to(dtype)[..., 1]


def transposed(rows, cols, dtype):
    return gapped(cols, rows, dtype).t()


LAYOUTS = {"gapped": gapped, "spread": spread, "transposed": transposed}


def make(tokens, depth, out, k, dtype, layout=gapped, active_dtype=None):
    """x, dy, weight, bias, active, positions; positions in no order, and weight NaN where it is replaced."""
    x, dy = layout(tokens, depth, dtype), layout(tokens, out, dtype)
    weight, active = layout(out, depth, dtype), layout(k, depth, active_dtype or dtype)
    positions = torch.stack([torch.randperm(out)[:k]] * 2, 1)[:, 0]
    weight[positions] = float("nan")
    return x, dy, weight, torch.randn(2 * out).to(dtype)[::2], active, positions


def formula(x, dy, weight, bias, active, positions):
    """y, y without a bias, dx; in the tensors' dtype, active rounded to it by the caller."""
    merged = weight.index_copy(0, positions, active)
    return x @ merged.t() + bias, x @ merged.t(), dy @ merged


def run(x, dy, weight, bias, active, positions):
    return (
        row_linear.forward(x, weight, bias, active, positions, "triton"),
        row_linear.forward(x, weight, None, active, positions, "triton"),
        row_linear.dx(dy, weight, active, positions, None, "triton"),
    )


def check(x, dy, weight, bias, active, positions):
    """No worse than the formula in plain PyTorch."""
    dtype, rounded = x.dtype, active.to(x.dtype)
    wide = [tensor.double() for tensor in (x, dy, weight, bias, rounded)]
    truth, plain = formula(*wide, positions), formula(x, dy, weight, bias, rounded, positions)
    actual = run(x, dy, weight, bias, active, positions)
    for name, each, true, usual in zip(("y", "y, no bias", "dx"), actual, truth, plain, strict=True):
        assert each.shape == true.shape and each.dtype == dtype and each.is_contiguous(), name
        assert relative_error(each, true) <= error_bound(relative_error(usual, true), dtype), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("tokens", "depth", "out", "k"), SHAPES)
def test_products(tokens, depth, out, k, layout, dtype):
    check(*make(tokens, depth, out, k, dtype, LAYOUTS[layout]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("active_dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_active_rows_in_another_dtype(active_dtype, dtype):
    check(*make(20, 40, 50, 7, dtype, active_dtype=active_dtype))


@pytest.mark.parametrize("group", (1, 2, 8))
@pytest.mark.parametrize(("tokens", "depth", "out"), [(40, 80, 70), (81, 50, 33)])
def test_every_tile_is_visited_once(monkeypatch, group, tokens, depth, out):
    """Small tiles: many rows and columns of them, the last group of rows not full, several steps of the sum."""
    small = launching.ProductConfig(16, 16, 16, group, num_warps=4, num_stages=1)
    monkeypatch.setitem(tuned._trying, "row_linear", small)
    check(*make(tokens, depth, out, out // 3, torch.float32))


@pytest.mark.parametrize("slot", (0, 1, 2))
def test_each_row_comes_from_its_own_place(slot):
    """Exact numbers: row i of W holds i + 1, active row j holds -(j + 1); the first and last rows are replaced too."""
    positions = torch.tensor([6, 0, 3]).roll(slot)
    weight = torch.arange(1.0, 8)[:, None].expand(7, 4).contiguous()
    active = -torch.arange(1.0, 4)[:, None].expand(3, 4).contiguous()
    expected = weight.index_copy(0, positions, active)
    y = row_linear.forward(torch.eye(4), weight, None, active, positions, "triton")
    dx = row_linear.dx(torch.eye(7), weight, active, positions, None, "triton")
    assert torch.equal(y, expected.t()) and torch.equal(dx, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_twice_and_inputs_keep_theirs(dtype):
    tensors = make(130, 210, 90, 11, dtype)
    before = [tensor.clone() for tensor in tensors]
    for first, second in zip(run(*tensors), run(*tensors), strict=True):
        assert torch.equal(first, second)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(7), old.nan_to_num(7))


def addresses(tensor):
    """Of every number of `tensor`, and of none beside them."""
    at = torch.tensor(tensor.data_ptr())
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        at = at[..., None] + torch.arange(size) * stride * tensor.element_size()
    return at.flatten().numpy()


class Guarded:
    """A kernel that may touch its arguments alone: memory beside them may be nobody's."""

    def __init__(self, kernel, monkeypatch):
        self.kernel, self.allowed, self.touched = kernel, None, 0
        for name, mask in (("create_masked_load", 1), ("create_masked_store", 2)):
            self._watch(name, mask, monkeypatch)

    def _watch(self, name, mask, monkeypatch):
        real = getattr(InterpreterBuilder, name)

        def watched(builder, *args):
            used = args[0].data[args[mask].data]
            assert np.isin(used, self.allowed).all(), f"{name} outside of the kernel's arguments"
            self.touched += used.size
            return real(builder, *args)

        monkeypatch.setattr(InterpreterBuilder, name, watched)

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            self.allowed = np.concatenate([addresses(tensor) for tensor in tensors])
            return self.kernel[grid](*args, **kwargs)

        return launch


@pytest.mark.parametrize("block_k", (16, 32))
@pytest.mark.parametrize(("tokens", "depth", "out"), [(21, 37, 33), (3, 32, 50), (1, 1, 1)])
def test_nothing_outside_is_touched(monkeypatch, tokens, depth, out, block_k):
    small = launching.ProductConfig(16, 16, block_k, 2, num_warps=4, num_stages=1)
    monkeypatch.setitem(tuned._trying, "row_linear", small)
    guarded = Guarded(row_linear._row_linear_kernel, monkeypatch)
    monkeypatch.setattr(row_linear, "_row_linear_kernel", guarded)
    check(*make(tokens, depth, out, max(out // 3, 1), torch.float32))
    assert guarded.touched


def test_rows_far_apart(tmp_path):
    """The last rows of x and W begin 2^31 numbers into a file that is nearly all hole."""
    far = torch.from_file(str(tmp_path / "hole"), shared=True, size=2**31 + 64, dtype=torch.float16)
    x, dy, weight, bias, active, positions = make(3, 32, 3, 1, torch.float16)
    far_x, far_weight = far.as_strided((3, 32), (2**30, 1)), far.as_strided((3, 32), (2**30, 1), 32)
    far_x.copy_(x), far_weight.copy_(weight)
    check(far_x, dy, far_weight, bias, active, positions)


@pytest.mark.parametrize("where", ("x", "weight", "active"))
def test_nan_stays_visible(where):
    """In the token, or the row of W', that it stands in, and nowhere else."""
    x, dy, weight, bias, active, positions = make(9, 20, 30, 4, torch.float32)
    row = next(row for row in range(30) if row not in positions) if where == "weight" else 2
    {"x": x, "weight": weight, "active": active}[where][row, 3] = float("nan")
    y, _, dx = run(x, dy, weight, bias, active, positions)
    bad_y, bad_dx = torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(dx, dtype=torch.bool)
    if where == "x":
        bad_y[row] = True
    else:
        bad_y[:, int(positions[row]) if where == "active" else row], bad_dx[:, 3] = True, True
    assert torch.equal(y.isnan(), bad_y) and torch.equal(dx.isnan(), bad_dx)


def gradients(function, arguments, **options):
    """The output of loki_linear and the gradients of what is trained, for a fixed random dout of strided rows."""
    trained = ("x", "active_weight", "active_bias")
    leaves = {k: v if v is None else v.detach().requires_grad_(k in trained) for k, v in arguments.items()}
    y = function(**leaves, **options)
    g = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape[-1], *y.shape[:-1], generator=g, dtype=torch.float64).to(y.dtype).movedim(0, -1)
    wanted = {k: v for k, v in leaves.items() if v is not None and k in trained}
    return {"y": y.detach()} | {
        "d" + k: v for k, v in zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy), strict=True)
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("active_dtype", (None, torch.float32))
@pytest.mark.parametrize("bias", ("none", "frozen", "active"))
@pytest.mark.parametrize(("shape", "k"), [((130,), 9), ((2, 3, 5), 45), ((1,), 1), ((0, 5), 9)], ids=str)
def test_whole_op(shape, k, bias, active_dtype, dtype):
    """Forward and every gradient through impl="triton"."""
    x, _, weight, b, active, positions = make(150, 67, 45, k, dtype, active_dtype=active_dtype)
    weight = weight.nan_to_num(0.5)  # the library's product of the truth reads all of W
    arguments = {
        "x": x[: torch.Size(shape).numel()].unflatten(0, shape), "weight": weight / 8,
        "bias": None if bias == "none" else b, "active_weight": active / 8, "positions": positions,
        "active_bias": torch.randn(k).to(active.dtype) if bias == "active" else None,
    }  # fmt: skip
    wide = {n: v.to(dtype).double() if v is not None and n != "positions" else v for n, v in arguments.items()}
    truth = gradients(reference.loki_linear, wide)
    plain = gradients(ops.loki_linear, arguments, impl="reference")
    actual = gradients(ops.loki_linear, arguments, impl="triton")
    for name, true in truth.items():
        assert actual[name].dtype == plain[name].dtype
        bound = error_bound(relative_error(plain[name], true), dtype)
        assert relative_error(actual[name], true) <= bound, name


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("trained", (True, False))
def test_opcheck(bias, trained):
    x, dy, weight, b, active, positions = make(5, 12, 9, 4, torch.float32, spread)
    weight = weight.nan_to_num(0.5)
    active_bias = torch.randn(4) if bias else None
    for tensor in (x, active, active_bias):
        if tensor is not None:
            tensor.requires_grad_(trained)
    arguments = (x, weight, b if bias else None, active, positions, active_bias, "triton")
    torch.library.opcheck(torch.ops.gci_kernels.row_linear.default, arguments)
    arguments = (dy, x.detach(), weight, active.detach(), positions, "triton", [True, bias, trained])
    torch.library.opcheck(torch.ops.gci_kernels.row_linear_backward.default, arguments)


def test_the_op_compiles_whole():
    x, _, weight, bias, active, positions = make(64, 48, 40, 6, torch.float32)
    weight, leaves = weight.nan_to_num(0.5), [x.detach().requires_grad_(), active.detach().requires_grad_()]

    def function(x, active):
        return ops.loki_linear(x, weight, bias, active, positions, impl="triton").square().sum()

    expected = torch.autograd.grad(function(*leaves), leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert torch.equal(actual, wanted)
