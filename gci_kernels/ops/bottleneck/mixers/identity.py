"""LoRA's mixer (arXiv 2106.09685): u = scaling * h. It keeps u, and nothing is computed again."""

import math
import sys

import torch
from torch import Tensor

from gci_kernels.ops.arguments import new_record
from gci_kernels.ops.bottleneck.mixer import Call, Kept, Mixer, Shape
from gci_kernels.ops.bottleneck.registry import register


def formula(h: Tensor, weights: Tensor | None, call: Call) -> Tensor:
    """u = h."""
    return h


def forward(projected: Tensor, weights: Tensor | None, call: Call) -> tuple[Tensor, Kept, Tensor]:
    """See :class:`~gci_kernels.ops.bottleneck.mixer.Stages`."""
    # Into a tensor of x's dtype: no copy of the sums' dtype is between.
    u = torch.mul(projected, call.scaling, out=projected.new_empty(projected.shape, dtype=call.dtype))
    nothing = u.new_empty(0)
    return u, new_record(Kept, (nothing, u, u.new_empty(0))), u.new_empty(0)


def recompute(weights: Tensor | None, kept: Kept, call: Call) -> Tensor:
    """See :class:`~gci_kernels.ops.bottleneck.mixer.Stages`."""
    return kept.mixed


def backward(
    du: Tensor, doutput: Tensor | None, weights: Tensor | None, kept: Kept, call: Call
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See :class:`~gci_kernels.ops.bottleneck.mixer.Stages`."""
    dh = torch.mul(du, call.scaling, out=du.new_empty(du.shape, dtype=call.dtype))
    return dh, None, kept.mixed


def shapes(weights: Tensor | None, call: Call) -> list[Shape]:
    """See :class:`~gci_kernels.ops.bottleneck.mixer.Stages`."""
    tokens = math.prod(call.lead)
    return [((0,), call.dtype), ((tokens, call.rank), call.dtype), ((0,), call.dtype), ((0,), call.dtype)]


IDENTITY = register(Mixer(
    "identity", formula, stages=sys.modules[__name__],
    decode=lambda weights, settings: (None, None, None, 1, False), merge=lambda A, weights, settings: A,
))  # fmt: skip
