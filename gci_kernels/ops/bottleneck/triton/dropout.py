"""Dropout by itself, and the mask that the products read: a bit for each element (mask.py)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gci_kernels.ops.bottleneck import config
from gci_kernels.ops.bottleneck.philox import Dropout
from gci_kernels.ops.launching import check_tensors


@triton.jit
def _quads(t, first_column, seed, BLOCK_C: tl.constexpr):
    """The words of rows t and columns first_column + 0..BLOCK_C-1: four [t, BLOCK_C / 4], for four adjacent columns."""
    quad = first_column // 4 + tl.arange(0, BLOCK_C // 4)
    c0 = quad[None, :] + tl.zeros_like(t)[:, None]
    c1, zero = t[:, None] + tl.zeros_like(c0), tl.zeros_like(c0)  # the row fits 32 bits: its high word is 0
    return tl.philox(seed, c0, c1, zero, zero)


@triton.jit
def keep_tile(t, first_column, seed, threshold, BLOCK_C: tl.constexpr):
    """Which of the elements [t, first_column + 0..BLOCK_C-1] philox.py keeps; first_column is a multiple of 4."""
    w0, w1, w2, w3 = _quads(t, first_column, seed, BLOCK_C)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (t.shape[0], BLOCK_C))
    return words >= tl.cast(threshold, tl.uint32)


@triton.jit
def kept(bits_ptr, t, first_column, tokens, words, COLUMNS: tl.constexpr):
    """keep_tile of the mask at bits_ptr [tokens, words]; first_column is a multiple of COLUMNS, a power of two."""
    WORDS: tl.constexpr = max(COLUMNS // 32, 1)
    column = first_column // 32 + tl.arange(0, WORDS)
    at = bits_ptr + t.to(tl.int64)[:, None] * words + column[None, :]
    word = tl.load(at, (t[:, None] < tokens) & (column[None, :] < words), 0)
    # Of a word, all 32 bits or, in a narrow tile, some.
    bit = first_column % 32 + tl.arange(0, COLUMNS // WORDS)
    return tl.reshape((word[:, :, None] >> bit[None, None, :]) & 1, (t.shape[0], COLUMNS)) != 0


@triton.jit(do_not_specialize=["threshold", "seed_ptr"])
def _dropout_bits_kernel(
    bits_ptr, tokens, words, threshold, seed_ptr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """bits [tokens, words]: which elements philox.py keeps, BLOCK_C columns in a program."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(1) * BLOCK_C
    w0, w1, w2, w3 = _quads(t, first, tl.load(seed_ptr), BLOCK_C)
    least = tl.cast(threshold, tl.uint32)
    low = (w0 >= least).to(tl.int32) | ((w1 >= least).to(tl.int32) << 1)
    four = low | ((w2 >= least).to(tl.int32) << 2) | ((w3 >= least).to(tl.int32) << 3)
    bits = tl.reshape(four, (BLOCK_T, BLOCK_C // 32, 8)) << (4 * tl.arange(0, 8))[None, None, :]
    column = first // 32 + tl.arange(0, BLOCK_C // 32)
    out = bits_ptr + t.to(tl.int64)[:, None] * words + column[None, :]
    tl.store(out, tl.sum(bits, 2), (t[:, None] < tokens) & (column[None, :] < words))


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
    dropped = tl.where(keep_tile(t, first, tl.load(seed_ptr), threshold, BLOCK_C), x.to(tl.float32) * scale, 0.0)
    tl.store(out_ptr + row * stride_ot + col * stride_oc, dropped.to(x.dtype), inside)


def dropout_bits(tokens: int, width: int, p: float, seed: int | Tensor, device: torch.device) -> Tensor:
    """The mask of x [tokens, width] as :attr:`.philox.Dropout.seed` describes it; `seed` a number or a scalar."""
    words = triton.cdiv(width, 32)
    bits = torch.empty(tokens, words, dtype=torch.int32, device=device)
    if bits.numel() == 0:
        return bits
    c, drop = config.choose_dropout_config(tokens, max(width, 32)), Dropout(p, seed, width)
    with torch.cuda.device_of(bits):
        _dropout_bits_kernel[(triton.cdiv(tokens, c.block_t), triton.cdiv(width, c.block_c))](
            bits, tokens, words, drop.threshold, _on_device(seed, device),
            BLOCK_T=c.block_t, BLOCK_C=c.block_c, num_warps=c.num_warps,
        )  # fmt: skip
    return bits


def mask_arguments(drop: Dropout | None, x: Tensor) -> tuple[int, Tensor, int, float]:
    """(columns, bits, words, scale) as kernels take them, for the mask of x [tokens, width].

    Without dropout (0, x, 0, 1), where x is not read.
    """
    if drop is None:
        return 0, x, 0, 1.0
    bits = drop.mask
    if bits is None:
        bits = dropout_bits(x.shape[0], x.shape[1], drop.p, drop.seed, x.device)
    return drop.columns, bits, bits.shape[1], drop.scale


def _on_device(seed: int | Tensor, device: torch.device) -> Tensor:
    """A seed as an int64 scalar on `device`; a copy only where it is elsewhere."""
    return torch.as_tensor(seed, dtype=torch.int64, device=device)


def _dropout(x: Tensor, out: Tensor, p: float, seed: int | Tensor) -> Tensor:
    check_tensors(x=x)
    tokens, width = x.shape
    if x.numel() == 0:
        return out
    c, drop = config.choose_dropout_config(tokens, width), Dropout(p, seed, width)
    with torch.cuda.device_of(x):
        _dropout_fwd_kernel[(triton.cdiv(tokens, c.block_t), triton.cdiv(width, c.block_c))](
            x, out, tokens, width, *x.stride(), *out.stride(), drop.threshold, _on_device(seed, x.device), drop.scale,
            BLOCK_T=c.block_t, BLOCK_C=c.block_c, num_warps=c.num_warps,
        )  # fmt: skip
    return out


def dropout_(x: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """Drops elements of x [tokens, columns] in place, scales the others by 1 / (1 - p), and returns x."""
    return _dropout(x, x, p, seed)


def dropout(x: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """The same on a copy of x [tokens, columns], which is contiguous."""
    return _dropout(x, torch.empty_like(x, memory_format=torch.contiguous_format), p, seed)
