"""Error measures and their bounds, shared by the tests, `gci-kernels verify` and the benchmark's check."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """The error of one tensor of one case, and its bound.

    Attributes:
        case, impl, dtype, tensor: names for a table.
        error: as :func:`relative_error` gives it.
        bound: as :func:`error_bound` gives it.
    """

    case: str
    impl: str
    dtype: str
    tensor: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its bound."""
        return self.error <= self.bound


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; inf where either has NaN or inf; ||actual|| if expected is 0.

    Args:
        actual, expected: tensors of one shape and device, in any dtypes.

    Raises:
        ValueError: their shapes differ.
    """
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
    """The largest relative error allowed: twice that of plain PyTorch in the same dtype, plus one rounding.

    In float64 there is no reference of higher precision to measure plain PyTorch by; two orders of summation may differ
    by 1e-12.

    Args:
        plain_error: that of plain PyTorch.
        dtype: floating point.
    """
    if dtype == torch.float64:
        return 1e-12
    return 2 * plain_error + torch.finfo(dtype).eps
