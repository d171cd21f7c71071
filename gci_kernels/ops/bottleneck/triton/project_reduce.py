"""project_reduce: y @ m and u.T @ y from one reading of y; in backward, the adapter's two products with dY."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gci_kernels.hardware import gpus, tuned
from gci_kernels.ops.bottleneck import config
from gci_kernels.ops.bottleneck.triton.partial_sums import sum_splits
from gci_kernels.ops.launching import check_tensors


@triton.jit
def _project_reduce_fwd_kernel(
    y_ptr, m_ptr, u_ptr, du_ptr, dm_ptr, tokens, width, rank, share,
    stride_yt, stride_yn, stride_mn, stride_mr, stride_ut, stride_ur,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A program holds BLOCK_N columns of y and walks its share of the tokens.

    du[its columns] = y @ m over these columns, du [parts of the columns, tokens, rank] float32;
    dm[its share] = u.T @ y over these tokens, dm [parts of the tokens, rank, width] float32.
    """
    part_n, part_t = tl.program_id(0), tl.program_id(1)
    n, r, t = part_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_T)
    start = part_t * share
    stop = tl.minimum(start + share, tokens)
    in_n, in_r = n < width, r < rank
    col, at_r = n.to(tl.int64), r.to(tl.int64)
    row = start + t.to(tl.int64)
    y_ptrs = y_ptr + row[:, None] * stride_yt + col[None, :] * stride_yn
    u_ptrs = u_ptr + row[:, None] * stride_ut + at_r[None, :] * stride_ur
    du_ptrs = du_ptr + (tl.cast(part_n, tl.int64) * tokens + row[:, None]) * rank + at_r[None, :]
    m = tl.load(m_ptr + col[:, None] * stride_mn + at_r[None, :] * stride_mr, in_n[:, None] & in_r[None, :], 0.0)
    m = m.to(y_ptr.dtype.element_ty)
    dm = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for at in range(start, stop, BLOCK_T):
        in_t = t[:, None] < stop - at
        y = tl.load(y_ptrs, in_t & in_n[None, :], 0.0)
        u = tl.load(u_ptrs, in_t & in_r[None, :], 0.0)
        # dm first: the wait for du is then one for both. The other way round, dm's product would still be running when
        # the next step starts du's, and ptxas then waits for every matrix instruction by itself.
        dm = tl.dot(tl.trans(y), u, dm, input_precision="ieee")
        tl.store(du_ptrs, tl.dot(y, m, input_precision="ieee"), in_t & in_r[None, :])
        y_ptrs += tl.cast(stride_yt, tl.int64) * BLOCK_T
        u_ptrs += tl.cast(stride_ut, tl.int64) * BLOCK_T
        du_ptrs += tl.cast(rank, tl.int64) * BLOCK_T
    dm_row = (tl.cast(part_t, tl.int64) * rank + at_r[None, :]) * width
    tl.store(dm_ptr + dm_row + n[:, None], dm, in_n[:, None] & in_r[None, :])


def _config(y: Tensor, rank: int) -> config.ReduceConfig | None:
    capability = gpus.device_capability(y.device)
    return tuned.config("project_reduce", y.device, y.shape[0], y.shape[1], rank, y.dtype, capability)


def one_reading(y: Tensor, rank: int) -> bool:
    """Whether :func:`project_reduce` is faster than project and reduce, and can run."""
    return _config(y, rank) is not None


def project_reduce(y: Tensor, m: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(y @ m [tokens, rank], u.T @ y [rank, width]), both float32; only where :func:`one_reading` holds."""
    check_tensors(y=y, m=m)
    check_tensors((y.dtype,), u=u)
    (tokens, width), rank = y.shape, m.shape[1]
    c = _config(y, rank)
    if c is None:
        raise ValueError(f"no configuration reads y {list(y.shape)} {y.dtype} once for rank {rank}")
    du = y.new_empty(triton.cdiv(width, c.block_n), tokens, rank, dtype=torch.float32)
    dm = y.new_empty(c.splits, rank, width, dtype=torch.float32)
    share = triton.cdiv(triton.cdiv(tokens, c.splits), c.block_t) * c.block_t
    with torch.cuda.device_of(y):
        _project_reduce_fwd_kernel[(triton.cdiv(width, c.block_n), c.splits)](
            y, m, u, du, dm, tokens, width, rank, share, *y.stride(), *m.stride(), *u.stride(),
            BLOCK_T=c.block_t, BLOCK_N=c.block_n, BLOCK_R=c.block_r, num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
        return sum_splits(du), sum_splits(dm)
