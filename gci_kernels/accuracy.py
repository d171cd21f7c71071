"""What right means, in numbers: error measures shared by the tests, `gci-kernels verify` and the benchmark's gate."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One tensor of one case: its error and the most it may be."""

    case: str
    impl: str
    dtype: str
    tensor: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN gives inf; 0 for two tensors of zeros or no elements."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        raise ValueError(f"actual must be {list(expected.shape)} like expected, got {list(actual.shape)}")
    difference, scale = (actual - expected).norm(), expected.norm()
    if not torch.isfinite(actual).all() or not torch.isfinite(difference):
        return float("inf")
    if scale == 0:
        return float(difference)
    return float(difference / scale)


def error_bound(plain_error: float, dtype: torch.dtype) -> float:
    """The most that a kernel's relative error may be: twice that of plain PyTorch at the working dtype, plus rounding.

    For float64 there is no wider truth to measure plain PyTorch against; two orders of summation may differ by 1e-12.
    """
    if dtype == torch.float64:
        return 1e-12
    return 2 * plain_error + torch.finfo(dtype).eps
