"""reduce: u.T @ y for a narrow u, a sum over the tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gci_kernels.hardware import gpus, tuned
from gci_kernels.ops.bottleneck.philox import Dropout
from gci_kernels.ops.bottleneck.triton.dropout import kept, mask_arguments
from gci_kernels.ops.bottleneck.triton.partial_sums import sum_splits
from gci_kernels.ops.launching import check_tensors


@triton.jit
def _reduce_fwd_kernel(
    u_ptr, y_ptr, out_ptr, tokens, rank, width, share,
    stride_ut, stride_ur, stride_yt, stride_yn, dropped, bits_ptr, words, scale,
    DROPOUT: tl.constexpr, PLAIN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[split] = u[its share].T @ y[its share]; out [splits, rank, width] float32.

    DROPOUT: the first `dropped` columns of u see y through the mask; PLAIN: there are others, which see y.
    """
    split = tl.program_id(2)
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.arange(0, BLOCK_T)
    start = split * share
    stop = tl.minimum(start + share, tokens)
    row = (start + t.to(tl.int64))[:, None]
    in_n, in_r = n[None, :] < width, r[None, :] < rank
    u_ptrs = u_ptr + row * stride_ut + r.to(tl.int64)[None, :] * stride_ur
    y_ptrs = y_ptr + row * stride_yt + n.to(tl.int64)[None, :] * stride_yn
    # The wide operand gives the rows of the product: matrix units take 64 rows, and the rank is often 16.
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for at in range(start, stop, BLOCK_T):
        u = tl.load(u_ptrs, in_r & (t[:, None] < stop - at), 0.0)
        y = tl.load(y_ptrs, in_n & (t[:, None] < stop - at), 0.0)
        if DROPOUT:
            if PLAIN:  # as in `project`: two products, one sum, one reading of y
                plain = tl.where(r[None, :] < dropped, 0.0, u).to(u.dtype)
                acc = tl.dot(tl.trans(y), plain, acc, input_precision="ieee")
                u = tl.where(r[None, :] < dropped, u, 0.0).to(u.dtype)
            y = tl.where(kept(bits_ptr, at + t, first, tokens, words, BLOCK_N), y, 0.0).to(y.dtype)
        acc = tl.dot(tl.trans(y), u, acc, input_precision="ieee")
        u_ptrs += tl.cast(stride_ut, tl.int64) * BLOCK_T
        y_ptrs += tl.cast(stride_yt, tl.int64) * BLOCK_T
    if DROPOUT:
        acc = tl.where(r[None, :] < dropped, acc * scale, acc)
    out_row = (tl.cast(split, tl.int64) * rank + r.to(tl.int64)[None, :]) * width
    tl.store(out_ptr + out_row + n[:, None], acc, in_r & (n[:, None] < width))


def reduce(u: Tensor, y: Tensor, drop: Dropout | None = None) -> Tensor:
    """u.T @ y [rank, width] for u [tokens, rank] and y [tokens, width] of one dtype, float32 sums.

    `drop` masks y for the first columns of u.
    """
    check_tensors(y=y)
    check_tensors((y.dtype,), u=u)
    (tokens, rank), width = u.shape, y.shape[1]
    capability = gpus.device_capability(y.device)
    c = tuned.config("reduce", y.device, tokens, rank, width, y.dtype, capability)
    sums = y.new_empty(c.splits, rank, width, dtype=torch.float32)
    if sums.numel() == 0:
        return sums[0]
    share = triton.cdiv(triton.cdiv(tokens, c.splits), c.block_t) * c.block_t
    grid = (triton.cdiv(width, c.block_n), triton.cdiv(rank, c.block_r), c.splits)
    with torch.cuda.device_of(y):
        _reduce_fwd_kernel[grid](
            u, y, sums, tokens, rank, width, share, *u.stride(), *y.stride(), *mask_arguments(drop, y),
            DROPOUT=drop is not None, PLAIN=drop is not None and drop.columns < rank,
            BLOCK_T=c.block_t, BLOCK_R=c.block_r, BLOCK_N=c.block_n, num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
        return sum_splits(sums)
