"""The products of a linear layer with trained rows, from two tables of rows: W and the active ones; no merged copy."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gci_kernels.hardware import gpus, tuned
from gci_kernels.ops.launching import check_tensors


@triton.jit
def _starts(row, slot, w_ptr, active_ptr, stride_wr, stride_ar):
    """Where each of W's rows begins: at `slot` of the active ones, or where that is -1 in W."""
    return tl.where(slot < 0, w_ptr + row.to(tl.int64) * stride_wr, active_ptr + slot.to(tl.int64) * stride_ar)


@triton.jit
def _row_linear_kernel(
    x_ptr, w_ptr, active_ptr, source_ptr, bias_ptr, y_ptr, tokens, depth, width,
    stride_xt, stride_xk, stride_wr, stride_ar,
    SUM_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = x @ W'.T + bias, or with SUM_ROWS y = x @ W'; y [tokens, width].

    source: int32, for each of W's rows its slot among the active ones, or -1. Pointers are selected, not numbers: a
    tile has one load, which copies it to shared memory while earlier ones are multiplied.
    """
    # Programs that run side by side share GROUP rows of tiles: W's rows are read from L2, not again from memory.
    tiles_t, tiles_n, pid = tl.cdiv(tokens, BLOCK_T), tl.cdiv(width, BLOCK_N), tl.program_id(0)
    first_t = pid // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_t - first_t, GROUP)
    t = (first_t + pid % (GROUP * tiles_n) % rows) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = pid % (GROUP * tiles_n) // rows * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_t, in_n = t[:, None] < tokens, n[None, :] < width
    x_ptrs = x_ptr + t.to(tl.int64)[:, None] * stride_xt + k.to(tl.int64)[None, :] * stride_xk
    if SUM_ROWS:
        slot = tl.load(source_ptr + k, k < depth, -1)
    else:  # a row of W' is a column of the product: the same ones in every step
        slot = tl.load(source_ptr + n, n < width, -1)
        w_ptrs = _starts(n, slot, w_ptr, active_ptr, stride_wr, stride_ar)[None, :] + k[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for at in range(0, depth, BLOCK_K):
        if SUM_ROWS:
            w_ptrs = _starts(at + k, slot, w_ptr, active_ptr, stride_wr, stride_ar)[:, None] + n[None, :]
            # Loaded one step early: a copy whose address is loaded in the same step would start only one step ahead.
            slot = tl.load(source_ptr + at + BLOCK_K + k, k < depth - at - BLOCK_K, -1)
        if EVEN_K:
            x, w = tl.load(x_ptrs, in_t, 0.0), tl.load(w_ptrs, in_n, 0.0)
        else:
            x = tl.load(x_ptrs, in_t & (k[None, :] < depth - at), 0.0)
            w = tl.load(w_ptrs, in_n & (k[:, None] < depth - at), 0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += tl.cast(stride_xk, tl.int64) * BLOCK_K
        if not SUM_ROWS:
            w_ptrs += BLOCK_K
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, n < width, 0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + t.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), in_t & in_n)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, positions: Tensor, form: str) -> Tensor:
    """x [tokens, depth] @ W'.T + bias [rows], in x's dtype; W' is weight [rows, depth] with `active` at `positions`.

    x, weight and bias are of one dtype, bfloat16, float16 or float32, on a GPU; `active` [k, depth] of any; `form` is
    for other implementations.

    Raises:
        ValueError: a tensor is on another device, of another dtype or too large.
    """
    return _product(x, weight, bias, active, positions, sum_rows=False)


def dx(dy: Tensor, weight: Tensor, active: Tensor, positions: Tensor, chosen: Tensor, form: str) -> Tensor:
    """dy [tokens, rows] @ W', in dy's dtype; as :func:`forward`. `chosen` is for other implementations."""
    return _product(dy, weight, None, active, positions, sum_rows=True)


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, positions: Tensor, sum_rows: bool
) -> Tensor:
    check_tensors(**{"dy" if sum_rows else "x": x})
    active = active.to(x.dtype).contiguous()
    check_tensors((x.dtype,), weight=weight, active=active, bias=bias)
    check_tensors((torch.int64,), positions=positions)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    (tokens, depth), width = x.shape, weight.shape[1 if sum_rows else 0]
    capability = gpus.device_capability(x.device)
    c = tuned.config("row_linear", x.device, tokens, depth, width, x.dtype, capability, sum_rows)
    y = x.new_empty(tokens, width)
    if y.numel() == 0:
        return y
    added = x if bias is None else bias.contiguous()  # x: never loaded
    with torch.cuda.device_of(x):
        _row_linear_kernel[(triton.cdiv(tokens, c.block_t) * triton.cdiv(width, c.block_n),)](
            x, weight, active, _source(positions, weight.shape[0]), added, y, tokens, depth, width,
            *x.stride(), weight.stride(0), active.stride(0),
            SUM_ROWS=sum_rows, HAS_BIAS=bias is not None, EVEN_K=depth % c.block_k == 0,
            BLOCK_T=c.block_t, BLOCK_N=c.block_n, BLOCK_K=c.block_k, GROUP=c.group,
            num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    return y


def _source(positions: Tensor, rows: int) -> Tensor:
    """[rows] int32: the slot of each row among the active ones, or -1.

    Three small launches beside a product of many tokens; a kernel of our own would be one, and one more to prove.
    """
    slots = torch.arange(positions.shape[0], dtype=torch.int32, device=positions.device)
    return torch.full((rows,), -1, dtype=torch.int32, device=positions.device).index_copy_(0, positions, slots)
