"""The stages as Triton kernels, for GPU tensors in bfloat16, float16 and float32; and interpreted, on CPU tensors.

Same functions as aten.py. Sums are kept in float32, and project and reduce return them unrounded. Any strides, any
sizes up to 2^31: masks pad inside the kernels. What takes more than one program a sum takes two stages, in a fixed
order, so that the same call gives the same bits. Blocks come from ops/triton_config.py.

Row offsets are int64, for tokens * stride passes 2^31. float32 products ask for input_precision="ieee": the default,
TF32, keeps 11 bits of each factor, a thousand times the error of the float32 that was asked for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gci_kernels.ops import triton_config as config


@triton.jit
def _project_fwd_kernel(
    x_ptr, m_ptr, out_ptr, tokens, depth, width, share,
    stride_xt, stride_xk, stride_mk, stride_mn,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split] = x[:, its share] @ m[its share]; out [splits, tokens, width] float32."""
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
        m = tl.load(m_ptrs, in_n & (k[:, None] < stop - at), 0.0)
        acc = tl.dot(x, m.to(x.dtype), acc, input_precision="ieee")
        x_ptrs += tl.cast(stride_xk, tl.int64) * BLOCK_K
        m_ptrs += tl.cast(stride_mk, tl.int64) * BLOCK_K
    out_row = (tl.cast(split, tl.int64) * tokens + row) * width
    tl.store(out_ptr + out_row + n[None, :], acc, in_t & in_n)


def project(x: Tensor, m: Tensor) -> Tensor:
    config.check_tensors(x=x, m=m)
    (tokens, depth), width = x.shape, m.shape[1]
    c = config.choose_project_config(tokens, depth, width, x.dtype, config.device_capability(x.device))
    sums = x.new_empty(c.splits, tokens, width, dtype=torch.float32)
    if sums.numel() == 0:
        return sums[0]
    share = triton.cdiv(triton.cdiv(depth, c.splits), c.block_k) * c.block_k
    grid = (triton.cdiv(tokens, c.block_t), triton.cdiv(width, c.block_n), c.splits)
    with torch.cuda.device_of(x):
        _project_fwd_kernel[grid](
            x, m, sums, tokens, depth, width, share, *x.stride(), *m.stride(),
            BLOCK_T=c.block_t, BLOCK_N=c.block_n, BLOCK_K=c.block_k, num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
        return _sum_splits(sums)


@triton.jit
def _expand_fwd_kernel(
    u_ptr, m_ptr, x_ptr, w_ptr, bias_ptr, y_ptr, tokens, rank, depth, width,
    stride_ut, stride_ur, stride_mr, stride_mn, stride_xt, stride_xk, stride_wk, stride_wn,
    HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = x @ w + u @ m + bias, y [tokens, width]: the base product whose loop goes on over the adapter's rank."""
    # Programs that run side by side share GROUP rows of tiles: w's columns are read from L2, not again from memory.
    tiles_t, tiles_n, pid = tl.cdiv(tokens, BLOCK_T), tl.cdiv(width, BLOCK_N), tl.program_id(0)
    first_t = pid // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_t - first_t, GROUP)
    tile_t = first_t + pid % (GROUP * tiles_n) % rows
    tile_n = pid % (GROUP * tiles_n) // rows
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row, col = t.to(tl.int64)[:, None], n.to(tl.int64)[None, :]
    in_t, in_n = t[:, None] < tokens, n[None, :] < width
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if HAS_BASE:
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
    r = tl.arange(0, BLOCK_R)
    at_r = r.to(tl.int64)
    u_ptrs = u_ptr + row * stride_ut + at_r[None, :] * stride_ur
    m_ptrs = m_ptr + at_r[:, None] * stride_mr + col * stride_mn
    # One step for most adapters: a pipeline would only take shared memory from the loop above.
    for at in tl.range(0, rank, BLOCK_R, num_stages=1):
        u = tl.load(u_ptrs, in_t & (r[None, :] < rank - at), 0.0)
        m = tl.load(m_ptrs, in_n & (r[:, None] < rank - at), 0.0)
        acc = tl.dot(u, m.to(u.dtype), acc, input_precision="ieee")
        u_ptrs += tl.cast(stride_ur, tl.int64) * BLOCK_R
        m_ptrs += tl.cast(stride_mr, tl.int64) * BLOCK_R
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, n < width, 0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row * width + col, acc.to(y_ptr.dtype.element_ty), in_t & in_n)


def expand(u: Tensor, m: Tensor, x: Tensor, w: Tensor | None, bias: Tensor | None) -> Tensor:
    config.check_tensors(u=u, m=m)
    has_base = w is not None
    if has_base:
        config.check_tensors(dtypes=(u.dtype,), x=x, w=w)
        config.check_tensors(bias=bias)
    (tokens, rank), width = u.shape, m.shape[1]
    depth = w.shape[0] if has_base else 0
    c = config.choose_expand_config(tokens, depth, width, rank, u.dtype, config.device_capability(u.device))
    y = u.new_empty(tokens, width)
    if y.numel() == 0:
        return y
    has_bias = has_base and bias is not None
    bias = bias.contiguous() if has_bias else u  # what is absent is never loaded, but a pointer has to be given
    x, w = (x, w) if has_base else (u, m)
    with torch.cuda.device_of(u):
        _expand_fwd_kernel[(triton.cdiv(tokens, c.block_t) * triton.cdiv(width, c.block_n),)](
            u, m, x, w, bias, y, tokens, rank, depth, width, *u.stride(), *m.stride(), *x.stride(), *w.stride(),
            HAS_BASE=has_base, HAS_BIAS=has_bias, EVEN_K=depth % c.block_k == 0,
            BLOCK_T=c.block_t, BLOCK_N=c.block_n, BLOCK_K=c.block_k, BLOCK_R=c.block_r, GROUP=c.group,
            num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    return y


@triton.jit
def _reduce_fwd_kernel(
    u_ptr, y_ptr, out_ptr, tokens, rank, width, share,
    stride_ut, stride_ur, stride_yt, stride_yn,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[split] = u[its share].T @ y[its share]; out [splits, rank, width] float32."""
    split = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.arange(0, BLOCK_T)
    start = split * share
    stop = tl.minimum(start + share, tokens)
    row = (start + t.to(tl.int64))[:, None]
    in_n, in_r = n[None, :] < width, r[None, :] < rank
    u_ptrs = u_ptr + row * stride_ut + r.to(tl.int64)[None, :] * stride_ur
    y_ptrs = y_ptr + row * stride_yt + n.to(tl.int64)[None, :] * stride_yn
    # The wide side makes the rows of the product: matrix units take 64 of them, and the rank has often 16.
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for at in range(start, stop, BLOCK_T):
        u = tl.load(u_ptrs, in_r & (t[:, None] < stop - at), 0.0)
        y = tl.load(y_ptrs, in_n & (t[:, None] < stop - at), 0.0)
        acc = tl.dot(tl.trans(y), u, acc, input_precision="ieee")
        u_ptrs += tl.cast(stride_ut, tl.int64) * BLOCK_T
        y_ptrs += tl.cast(stride_yt, tl.int64) * BLOCK_T
    out_row = (tl.cast(split, tl.int64) * rank + r.to(tl.int64)[None, :]) * width
    tl.store(out_ptr + out_row + n[:, None], acc, in_r & (n[:, None] < width))


def reduce(u: Tensor, y: Tensor) -> Tensor:
    config.check_tensors(y=y)
    config.check_tensors(dtypes=(y.dtype,), u=u)
    (tokens, rank), width = u.shape, y.shape[1]
    c = config.choose_reduce_config(tokens, rank, width, y.dtype, config.device_capability(y.device))
    sums = y.new_empty(c.splits, rank, width, dtype=torch.float32)
    if sums.numel() == 0:
        return sums[0]
    share = triton.cdiv(triton.cdiv(tokens, c.splits), c.block_t) * c.block_t
    grid = (triton.cdiv(width, c.block_n), triton.cdiv(rank, c.block_r), c.splits)
    with torch.cuda.device_of(y):
        _reduce_fwd_kernel[grid](
            u, y, sums, tokens, rank, width, share, *u.stride(), *y.stride(),
            BLOCK_T=c.block_t, BLOCK_R=c.block_r, BLOCK_N=c.block_n, num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
        return _sum_splits(sums)


@triton.jit
def _sum_splits_kernel(sums_ptr, out_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of sums [SPLITS, size] over its first dimension, in that order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.load(sums_ptr + at, at < size, 0.0)
    for split in range(1, SPLITS):
        acc += tl.load(sums_ptr + tl.cast(split, tl.int64) * size + at, at < size, 0.0)
    tl.store(out_ptr + at, acc, at < size)


def _sum_splits(sums: Tensor) -> Tensor:
    """The second stage of a sum that several programs shared."""
    if sums.shape[0] == 1:
        return sums[0]
    out, block = torch.empty_like(sums[0]), 512
    _sum_splits_kernel[(triton.cdiv(out.numel(), block),)](sums, out, out.numel(), SPLITS=sums.shape[0], BLOCK=block)
    return out


@triton.jit
def _dropout_fwd_kernel(
    x_ptr, out_ptr, tokens, width, stride_xt, stride_xc, stride_ot, stride_oc, threshold, seed, scale,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = x * scale where the word of philox.py is at least threshold, else 0; in place where out_ptr is x_ptr."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    quad = tl.program_id(1) * (BLOCK_C // 4) + tl.arange(0, BLOCK_C // 4)
    c0 = quad[None, :] + tl.zeros((BLOCK_T, BLOCK_C // 4), tl.int32)
    c1, zero = t[:, None] + tl.zeros_like(c0), tl.zeros_like(c0)  # the row fits 32 bits: its high word is 0
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero)
    # Four words for four columns, laid side by side.
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_T, BLOCK_C))
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row, col = t.to(tl.int64)[:, None], c.to(tl.int64)[None, :]
    inside = (t[:, None] < tokens) & (c[None, :] < width)
    x = tl.load(x_ptr + row * stride_xt + col * stride_xc, inside, 0.0)
    kept = tl.where(words >= tl.cast(threshold, tl.uint32), x.to(tl.float32) * scale, 0.0)
    tl.store(out_ptr + row * stride_ot + col * stride_oc, kept.to(x.dtype), inside)


def _dropout(x: Tensor, out: Tensor, p: float, seed: int) -> Tensor:
    config.check_tensors(x=x)
    tokens, width = x.shape
    if x.numel() == 0:
        return out
    c = config.choose_dropout_config(tokens, width)
    with torch.cuda.device_of(x):
        _dropout_fwd_kernel[(triton.cdiv(tokens, c.block_t), triton.cdiv(width, c.block_c))](
            x, out, tokens, width, *x.stride(), *out.stride(), int(p * 2**32), seed, 1 / (1 - p),
            BLOCK_T=c.block_t, BLOCK_C=c.block_c, num_warps=c.num_warps,
        )  # fmt: skip
    return out


def dropout_(x: Tensor, p: float, seed: int) -> Tensor:
    return _dropout(x, x, p, seed)


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    return _dropout(x, torch.empty_like(x, memory_format=torch.contiguous_format), p, seed)
