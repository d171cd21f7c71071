"""expand: x @ w + u @ m + bias, the base product with the adapter as one more step of its loop; forward and dX."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gci_kernels.hardware import gpus, tuned
from gci_kernels.ops.bottleneck import config
from gci_kernels.ops.bottleneck.philox import Dropout
from gci_kernels.ops.bottleneck.triton.dropout import kept, mask_arguments
from gci_kernels.ops.bottleneck.triton.expand_persistent import can_describe, expand_persistent
from gci_kernels.ops.bottleneck.triton.tiles import tile_of
from gci_kernels.ops.launching import check_tensors


@triton.jit
def _add_rank(
    acc, u_ptr, m_ptr, row, col, in_t, in_n, first, stop, stride_ut, stride_ur, stride_mr, stride_mn,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + u[:, first:stop] @ m[first:stop]."""
    r = tl.arange(0, BLOCK_R)
    at_r = first + r.to(tl.int64)
    u_ptrs = u_ptr + row * stride_ut + at_r[None, :] * stride_ur
    m_ptrs = m_ptr + at_r[:, None] * stride_mr + col * stride_mn
    # Most adapters take one step: a pipeline would only use shared memory that the base product's loop needs.
    for at in tl.range(first, stop, BLOCK_R, num_stages=1):
        u = tl.load(u_ptrs, in_t & (r[None, :] < stop - at), 0.0)
        m = tl.load(m_ptrs, in_n & (r[:, None] < stop - at), 0.0)
        acc = tl.dot(u, m.to(u.dtype), acc, input_precision="ieee")
        u_ptrs += tl.cast(stride_ur, tl.int64) * BLOCK_R
        m_ptrs += tl.cast(stride_mr, tl.int64) * BLOCK_R
    return acc


@triton.jit
def _expand_fwd_kernel(
    u_ptr, m_ptr, x_ptr, w_ptr, bias_ptr, y_ptr, tokens, rank, depth, width,
    stride_ut, stride_ur, stride_mr, stride_mn, stride_xt, stride_xk, stride_wk, stride_wn,
    dropped, bits_ptr, words, scale,
    HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
    W_BY_ROWS: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = x @ w + u @ m + bias, y [tokens, width].

    DESCRIPTORS: x_ptr, w_ptr and y_ptr are tensor descriptors, w's of the transposed matrix unless W_BY_ROWS; the copy
    engine then reads whole tiles, and no thread holds a pointer. DROPOUT: what the first `dropped` of the rank add
    goes through the mask.
    """
    tile_t, tile_n = tile_of(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.cdiv(width, BLOCK_N), GROUP)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row, col = t.to(tl.int64)[:, None], n.to(tl.int64)[None, :]
    in_t, in_n = t[:, None] < tokens, n[None, :] < width
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if DROPOUT:  # first, while the sum holds nothing else
        acc = _add_rank(
            acc, u_ptr, m_ptr, row, col, in_t, in_n, 0, dropped, stride_ut, stride_ur, stride_mr, stride_mn, BLOCK_R
        )
        acc = tl.where(kept(bits_ptr, t, tile_n * BLOCK_N, tokens, words, BLOCK_N), acc * scale, 0.0)
    if HAS_BASE:
        if DESCRIPTORS:
            for at in range(0, depth, BLOCK_K):
                x = x_ptr.load([tile_t * BLOCK_T, at])
                if W_BY_ROWS:
                    w = w_ptr.load([at, tile_n * BLOCK_N])
                else:
                    w = w_ptr.load([tile_n * BLOCK_N, at]).T
                acc = tl.dot(x, w, acc, input_precision="ieee")
        else:
            k = tl.arange(0, BLOCK_K)
            at_k = k.to(tl.int64)
            x_ptrs = x_ptr + row * stride_xt + at_k[None, :] * stride_xk
            w_ptrs = w_ptr + at_k[:, None] * stride_wk + col * stride_wn
            for at in range(0, depth, BLOCK_K):
                if EVEN_K:
                    x, w = tl.load(x_ptrs, in_t, 0.0), tl.load(w_ptrs, in_n, 0.0)
                else:
                    x = tl.load(x_ptrs, in_t & (k[None, :] < depth - at), 0.0)
                    w = tl.load(w_ptrs, in_n & (k[:, None] < depth - at), 0.0)
                acc = tl.dot(x, w, acc, input_precision="ieee")
                x_ptrs += tl.cast(stride_xk, tl.int64) * BLOCK_K
                w_ptrs += tl.cast(stride_wk, tl.int64) * BLOCK_K
    acc = _add_rank(
        acc, u_ptr, m_ptr, row, col, in_t, in_n, dropped, rank, stride_ut, stride_ur, stride_mr, stride_mn, BLOCK_R
    )
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, n < width, 0.0).to(tl.float32)[None, :]
    if DESCRIPTORS:
        y_ptr.store([tile_t * BLOCK_T, tile_n * BLOCK_N], acc.to(u_ptr.dtype.element_ty))
    else:
        tl.store(y_ptr + row * width + col, acc.to(y_ptr.dtype.element_ty), in_t & in_n)


def expand(
    u: Tensor, m: Tensor, x: Tensor, w: Tensor | None, bias: Tensor | None, drop: Dropout | None = None
) -> Tensor:
    """u [tokens, rank] @ m [rank, width] + x [tokens, depth] @ w [depth, width] + bias, in u's dtype.

    Without w, the first product alone. `drop` masks what the first columns of u add.
    """
    check_tensors(u=u, m=m)
    if w is not None:
        check_tensors((u.dtype,), x=x, w=w)
        check_tensors(bias=bias)
    (tokens, rank), width = u.shape, m.shape[1]
    depth = 0 if w is None else w.shape[0]
    capability = gpus.device_capability(u.device)
    c = tuned.config("expand", u.device, tokens, depth, width, rank, u.dtype, capability, drop is not None)
    y = u.new_empty(tokens, width)
    if y.numel() == 0:
        return y
    bias = None if w is None or bias is None else bias.contiguous()
    has_base, has_bias = w is not None, bias is not None
    # Absent tensors need a placeholder, which is not read.
    added = u if bias is None else bias
    x, w = (u, m) if w is None else (x, w)
    operands, by_rows = (x, w, y), w.stride(1) == 1
    descriptors = c.descriptors and depth > 0 and all(map(can_describe, (x, w if by_rows else w.t(), y)))
    if descriptors and c.persistent:
        expand_persistent(u, m, x, w, bias, y, c)
        return y
    if descriptors:
        operands = _descriptors(x, w, y, by_rows, c)
    with torch.cuda.device_of(u):
        _expand_fwd_kernel[(triton.cdiv(tokens, c.block_t) * triton.cdiv(width, c.block_n),)](
            u, m, operands[0], operands[1], added, operands[2], tokens, rank, depth, width,
            *u.stride(), *m.stride(), *x.stride(), *w.stride(), *mask_arguments(drop, y),
            HAS_BASE=has_base, HAS_BIAS=has_bias, EVEN_K=depth % c.block_k == 0, DESCRIPTORS=descriptors,
            W_BY_ROWS=by_rows, DROPOUT=drop is not None,
            BLOCK_T=c.block_t, BLOCK_N=c.block_n, BLOCK_K=c.block_k, BLOCK_R=c.block_r, GROUP=c.group,
            num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    return y


def _descriptors(x: Tensor, w: Tensor, y: Tensor, by_rows: bool, c: config.ExpandConfig) -> tuple:
    block_w = [c.block_k, c.block_n] if by_rows else [c.block_n, c.block_k]
    return (
        TensorDescriptor.from_tensor(x, [c.block_t, c.block_k]),
        TensorDescriptor.from_tensor(w if by_rows else w.t(), block_w),
        TensorDescriptor.from_tensor(y, [c.block_t, c.block_n]),
    )
