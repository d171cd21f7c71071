"""expand by whole tiles that the copy engine moves; as many programs as the chip runs at a time walk through them."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gci_kernels.hardware import gpus
from gci_kernels.ops.bottleneck.config import ExpandConfig
from gci_kernels.ops.bottleneck.triton.tiles import tile_of

# Of what Triton 3.6 makes of the fused loops, its ptxas runs one product after another.
_FUSED = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right columns of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _store_quarter(acc, bias_ptr, y_ptr, first_t, first_n, width, HAS_BIAS: tl.constexpr, COLUMNS: tl.constexpr):
    if HAS_BIAS:
        n = first_n + tl.arange(0, COLUMNS)
        acc += tl.load(bias_ptr + n, n < width, 0.0).to(tl.float32)[None, :]
    y_ptr.store([first_t, first_n], acc.to(y_ptr.dtype))


@triton.jit(do_not_specialize=["programs"])
def _expand_persistent_kernel(
    u_ptr, m_ptr, x_ptr, w_ptr, bias_ptr, y_ptr, tokens, rank, depth, width, programs,
    stride_ut, stride_ur, stride_mr, stride_mn,
    HAS_BIAS: tl.constexpr, W_BY_ROWS: tl.constexpr, FUSED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = x @ w + u @ m + bias, y [tokens, width]; the rank is at most BLOCK_R.

    x_ptr, w_ptr and y_ptr are tensor descriptors, w's of the transposed matrix unless W_BY_ROWS. FUSED: the compiler
    makes one loop of the two, so that the next tile's operands are on their way while this tile is finished and stored.
    """
    tl.assume(depth > 0)  # else there is a copy of all the code for tiles without a base product
    tiles_t, tiles_n = tl.cdiv(tokens, BLOCK_T), tl.cdiv(width, BLOCK_N)
    # The tile that is finished, counted apart from the one whose operands are being read, which runs ahead.
    finished = tl.program_id(0) - programs
    for tile in tl.range(tl.program_id(0), tiles_t * tiles_n, programs, flatten=FUSED):
        tile_t, tile_n = tile_of(tile, tiles_t, tiles_n, GROUP)
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for at in range(0, depth, BLOCK_K):
            x = x_ptr.load([tile_t * BLOCK_T, at])
            if W_BY_ROWS:
                w = w_ptr.load([at, tile_n * BLOCK_N])
            else:
                w = w_ptr.load([tile_n * BLOCK_N, at]).T
            acc = tl.dot(x, w, acc, input_precision="ieee")
        finished += programs
        tile_t, tile_n = tile_of(finished, tiles_t, tiles_n, GROUP)
        first_t, first_n = tile_t * BLOCK_T, tile_n * BLOCK_N
        t, n = first_t + tl.arange(0, BLOCK_T), first_n + tl.arange(0, BLOCK_N)
        # The rank in one step: a loop would be fused with the others, and after a second product ptxas no longer lets
        # the base product run ahead.
        r = tl.arange(0, BLOCK_R)
        u_ptrs = u_ptr + t.to(tl.int64)[:, None] * stride_ut + r.to(tl.int64)[None, :] * stride_ur
        m_ptrs = m_ptr + r.to(tl.int64)[:, None] * stride_mr + n.to(tl.int64)[None, :] * stride_mn
        u = tl.load(u_ptrs, (t[:, None] < tokens) & (r[None, :] < rank), 0.0)
        m = tl.load(m_ptrs, (n[None, :] < width) & (r[:, None] < rank), 0.0)
        acc = tl.dot(u, m.to(u.dtype), acc, input_precision="ieee")
        # By quarters: on its way out a whole tile would take the shared memory of more than one stage.
        QUARTER: tl.constexpr = BLOCK_N // 4
        left, right = _halves(acc, BLOCK_T, BLOCK_N)
        a, b = _halves(left, BLOCK_T, BLOCK_N // 2)
        c, d = _halves(right, BLOCK_T, BLOCK_N // 2)
        _store_quarter(a, bias_ptr, y_ptr, first_t, first_n, width, HAS_BIAS, QUARTER)
        _store_quarter(b, bias_ptr, y_ptr, first_t, first_n + QUARTER, width, HAS_BIAS, QUARTER)
        _store_quarter(c, bias_ptr, y_ptr, first_t, first_n + 2 * QUARTER, width, HAS_BIAS, QUARTER)
        _store_quarter(d, bias_ptr, y_ptr, first_t, first_n + 3 * QUARTER, width, HAS_BIAS, QUARTER)


def can_describe(matrix: Tensor) -> bool:
    """Whether the copy engine can read `matrix`: rows of adjacent numbers that begin at multiples of 16 bytes."""
    bytes_apart = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and bytes_apart % 16 == 0 and bytes_apart > 0 and matrix.data_ptr() % 16 == 0


def expand_persistent(
    u: Tensor, m: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor, c: ExpandConfig
) -> None:
    """Writes u @ m + x @ w + bias to y [tokens, width]; `can_describe` holds for x, y, and w or its transpose.

    Args:
        u, m, x, w: as in :func:`~gci_kernels.ops.bottleneck.triton.expand`.
        bias: [width] contiguous, or None.
        c: with at least 64 columns in a tile of y, and a block for all of the rank.
    """
    (tokens, rank), (depth, width), by_rows = u.shape, w.shape, w.stride(1) == 1
    block_w = [c.block_k, c.block_n] if by_rows else [c.block_n, c.block_k]
    tiles = triton.cdiv(tokens, c.block_t) * triton.cdiv(width, c.block_n)
    programs = min(tiles, gpus.processors(u.device))
    with torch.cuda.device_of(u):
        _expand_persistent_kernel[(programs,)](
            u, m, TensorDescriptor.from_tensor(x, [c.block_t, c.block_k]),
            TensorDescriptor.from_tensor(w if by_rows else w.t(), block_w), u if bias is None else bias,
            TensorDescriptor.from_tensor(y, [c.block_t, c.block_n // 4]), tokens, rank, depth, width, programs,
            *u.stride(), *m.stride(), HAS_BIAS=bias is not None, W_BY_ROWS=by_rows, FUSED=_FUSED,
            BLOCK_T=c.block_t, BLOCK_N=c.block_n, BLOCK_K=c.block_k, BLOCK_R=c.block_r, GROUP=c.group,
            num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
