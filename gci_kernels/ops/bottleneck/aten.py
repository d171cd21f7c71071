"""The stages as library products; any device, any floating dtype.

project(x, m) = x @ m;  expand_(y, u, m): y += u @ m;  reduce(u, y) = u.T @ y;  m is any two-dimensional view, in any
floating dtype, and converted to the other operand's.
"""

import torch
from torch import Tensor

from gci_kernels.ops.bottleneck import philox


def project(x: Tensor, m: Tensor) -> Tensor:
    return torch.mm(x, m.to(x.dtype))


def expand_(y: Tensor, u: Tensor, m: Tensor) -> None:
    y.addmm_(u, m.to(y.dtype))


def reduce(u: Tensor, y: Tensor) -> Tensor:
    return torch.mm(u.t(), y)


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    return torch.where(philox.keep_mask(x.shape[0], x.shape[1], p, seed, x.device), x * (1 / (1 - p)), 0)


def dropout_add_(out: Tensor, x: Tensor, p: float, seed: int) -> None:
    out += dropout(x, p, seed)
