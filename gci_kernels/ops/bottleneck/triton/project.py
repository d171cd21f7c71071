"""project: x @ m for a narrow m."""

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
def _project_fwd_kernel(
    x_ptr, m_ptr, out_ptr, tokens, depth, width, share,
    stride_xt, stride_xk, stride_mk, stride_mn, dropped, bits_ptr, words, scale,
    DROPOUT: tl.constexpr, PLAIN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split] = x[:, its share] @ m[its share]; out [splits, tokens, width] float32.

    DROPOUT: the first `dropped` columns of m see x through the mask; PLAIN: there are others, which see x.
    """
    split = tl.program_id(2)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    start = split * share
    stop = tl.minimum(start + share, depth)
    row, at_k = t.to(tl.int64)[:, None], start + k.to(tl.int64)
    in_t, in_n = t[:, None] < tokens, n[None, :] < width
    x_ptrs = x_ptr + row * stride_xt + at_k[None, :] * stride_xk
    m_ptrs = m_ptr + at_k[:, None] * stride_mk + n.to(tl.int64)[None, :] * stride_mn
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for at in range(start, stop, BLOCK_K):
        x = tl.load(x_ptrs, in_t & (k[None, :] < stop - at), 0.0)
        m = tl.load(m_ptrs, in_n & (k[:, None] < stop - at), 0.0).to(x.dtype)
        if DROPOUT:
            if PLAIN:
                # Two products, each with a part of m zeroed, share the sum and one reading of x, which takes longer.
                acc = tl.dot(x, tl.where(n[None, :] < dropped, 0.0, m).to(x.dtype), acc, input_precision="ieee")
                m = tl.where(n[None, :] < dropped, m, 0.0).to(x.dtype)
            x = tl.where(kept(bits_ptr, t, at, tokens, words, BLOCK_K), x, 0.0).to(x.dtype)
        acc = tl.dot(x, m, acc, input_precision="ieee")
        x_ptrs += tl.cast(stride_xk, tl.int64) * BLOCK_K
        m_ptrs += tl.cast(stride_mk, tl.int64) * BLOCK_K
    if DROPOUT:
        acc = tl.where(n[None, :] < dropped, acc * scale, acc)
    out_row = (tl.cast(split, tl.int64) * tokens + row) * width
    tl.store(out_ptr + out_row + n[None, :], acc, in_t & in_n)


def project(x: Tensor, m: Tensor, drop: Dropout | None = None) -> Tensor:
    """x [tokens, depth] @ m [depth, width], float32 sums; `drop` masks x for the first columns of m."""
    check_tensors(x=x, m=m)
    (tokens, depth), width = x.shape, m.shape[1]
    capability = gpus.device_capability(x.device)
    c = tuned.config("project", x.device, tokens, depth, width, x.dtype, capability)
    sums = x.new_empty(c.splits, tokens, width, dtype=torch.float32)
    if sums.numel() == 0:
        return sums[0]
    share = triton.cdiv(triton.cdiv(depth, c.splits), c.block_k) * c.block_k
    grid = (triton.cdiv(tokens, c.block_t), triton.cdiv(width, c.block_n), c.splits)
    with torch.cuda.device_of(x):
        _project_fwd_kernel[grid](
            x, m, sums, tokens, depth, width, share, *x.stride(), *m.stride(), *mask_arguments(drop, x),
            DROPOUT=drop is not None, PLAIN=drop is not None and drop.columns < width,
            BLOCK_T=c.block_t, BLOCK_N=c.block_n, BLOCK_K=c.block_k, num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
        return sum_splits(sums)
