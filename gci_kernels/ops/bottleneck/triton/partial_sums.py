"""The second stage of a sum that several programs shared."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512


@triton.jit
def _sum_splits_kernel(sums_ptr, out_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of sums [SPLITS, size] over its first dimension, in that order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.load(sums_ptr + at, at < size, 0.0)
    for split in range(1, SPLITS):
        acc += tl.load(sums_ptr + tl.cast(split, tl.int64) * size + at, at < size, 0.0)
    tl.store(out_ptr + at, acc, at < size)


def sum_splits(sums: Tensor) -> Tensor:
    """sums [splits, rows, cols] float32, contiguous -> [rows, cols], always added in the same order."""
    if sums.shape[0] == 1 or sums.numel() == 0:
        return sums[0]
    out = torch.empty_like(sums[0])
    _sum_splits_kernel[(triton.cdiv(out.numel(), _BLOCK),)](sums, out, out.numel(), SPLITS=sums.shape[0], BLOCK=_BLOCK)
    return out
