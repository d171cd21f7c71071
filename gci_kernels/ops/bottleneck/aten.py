"""The stages as library products; any device, any floating dtype.

The matrices m and w are any two-dimensional views; m comes in any floating dtype and is converted to the other
operand's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gci_kernels.impl import HALVES
from gci_kernels.ops.bottleneck import philox


def project(x: Tensor, m: Tensor) -> Tensor:
    """x [tokens, depth] @ m [depth, width]."""
    return torch.mm(x, m.to(x.dtype))


def expand(u: Tensor, m: Tensor, x: Tensor, w: Tensor | None, bias: Tensor | None) -> Tensor:
    """u [tokens, rank] @ m [rank, width] + x [tokens, depth] @ w [depth, width] + bias [width]."""
    m = m.to(u.dtype)
    if w is None:
        return torch.mm(u, m)
    # The second product is accumulated onto the first. With the adapter's first, the base product reads y along with
    # its own accumulation, and without a bias y is rounded once in full size: an update is small, and so is its
    # rounding. On a CPU in 16 bits (measured with AVX512_BF16) that order takes up to a tenth longer for few tokens and
    # as long for many, so there the base product goes first.
    if u.device.type == "cpu" and u.dtype in HALVES:
        return F.linear(x, w.t(), bias).addmm_(u, m)
    return F.linear(u, m.t(), bias).addmm_(x, w)


def expand_onto(y: Tensor, u: Tensor, m: Tensor, x: Tensor, w: Tensor | None, bias: Tensor | None) -> Tensor:
    """y [tokens, width] += what :func:`expand` returns, in place."""
    y.addmm_(u, m.to(u.dtype))
    if w is not None:
        y.addmm_(x, w)
    return y if bias is None else y.add_(bias)


def reduce(u: Tensor, y: Tensor) -> Tensor:
    """u.T @ y for u [tokens, rank] and y [tokens, width]."""
    return torch.mm(u.t(), y)


def dropout_(x: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """Dropout of x [tokens, width] in place, as philox.py defines it."""
    keep = philox.keep_mask(x.shape[0], x.shape[1], p, seed, x.device)
    return x.mul_(1 / (1 - p)).masked_fill_(~keep, 0)


def dropout(x: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """:func:`dropout_` of a contiguous copy."""
    return dropout_(x.clone(memory_format=torch.contiguous_format), p, seed)
