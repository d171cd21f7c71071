"""Dropout by itself, and the mask that the other kernels make while they read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gci_kernels.ops.bottleneck import config
from gci_kernels.ops.bottleneck.philox import Dropout
from gci_kernels.ops.launching import check_tensors


@triton.jit
def keep_tile(t, first_column, seed, threshold, BLOCK_C: tl.constexpr):
    """Which of the elements [t, first_column + 0..BLOCK_C-1] philox.py keeps; first_column is a multiple of 4."""
    quad = first_column // 4 + tl.arange(0, BLOCK_C // 4)
    c0 = quad[None, :] + tl.zeros_like(t)[:, None]
    c1, zero = t[:, None] + tl.zeros_like(c0), tl.zeros_like(c0)  # the row fits 32 bits: its high word is 0
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero)
    # Four words, for four adjacent columns.
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (t.shape[0], BLOCK_C))
    return words >= tl.cast(threshold, tl.uint32)


@triton.jit(do_not_specialize=["threshold", "seed_ptr"])
def _dropout_fwd_kernel(
    x_ptr, out_ptr, tokens, width, stride_xt, stride_xc, stride_ot, stride_oc, threshold, seed_ptr, scale,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = x * scale where philox.py keeps it, else 0; in place where out_ptr is x_ptr."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(1) * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    row, col = t.to(tl.int64)[:, None], c.to(tl.int64)[None, :]
    inside = (t[:, None] < tokens) & (c[None, :] < width)
    x = tl.load(x_ptr + row * stride_xt + col * stride_xc, inside, 0.0)
    kept = tl.where(keep_tile(t, first, tl.load(seed_ptr), threshold, BLOCK_C), x.to(tl.float32) * scale, 0.0)
    tl.store(out_ptr + row * stride_ot + col * stride_oc, kept.to(x.dtype), inside)


def _dropout(x: Tensor, out: Tensor, p: float, seed: int | Tensor) -> Tensor:
    check_tensors(x=x)
    tokens, width = x.shape
    if x.numel() == 0:
        return out
    c, drop = config.choose_dropout_config(tokens, width), Dropout(p, seed, width)
    with torch.cuda.device_of(x):
        _dropout_fwd_kernel[(triton.cdiv(tokens, c.block_t), triton.cdiv(width, c.block_c))](
            x, out, tokens, width, *x.stride(), *out.stride(), *Dropout.arguments(drop, x)[1:],
            BLOCK_T=c.block_t, BLOCK_C=c.block_c, num_warps=c.num_warps,
        )  # fmt: skip
    return out


def dropout_(x: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """Drops elements of x [tokens, columns] in place, scales the others by 1 / (1 - p), and returns x."""
    return _dropout(x, x, p, seed)


def dropout(x: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """The same on a copy of x [tokens, columns], which is contiguous."""
    return _dropout(x, torch.empty_like(x, memory_format=torch.contiguous_format), p, seed)
