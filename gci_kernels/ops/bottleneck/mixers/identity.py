"""LoRA's mixer: u = scaling * h. It keeps u, and nothing is made again."""

import math

import torch
from torch import Tensor

from gci_kernels.ops.bottleneck.mixers import Call, Inputs, Kept

JOINS = False


def _scaled(h: Tensor, call: Call) -> Tensor:
    """scaling * h in x's dtype, without a copy between."""
    return torch.mul(h, call.scaling, out=h.new_empty(h.shape, dtype=call.dtype))


def forward(projected: Tensor, inputs: Inputs, call: Call) -> tuple[Tensor, Kept, Tensor]:
    u = _scaled(projected, call)
    return u, Kept(u.new_empty(0), u, u.new_empty(0)), u.new_empty(0)


def again(inputs: Inputs, kept: Kept, call: Call) -> Tensor:
    return kept.mixed


def backward(
    du: Tensor, dshown: Tensor | None, inputs: Inputs, kept: Kept, call: Call
) -> tuple[Tensor, Tensor | None, Tensor]:
    return _scaled(du, call), None, kept.mixed


def shapes(inputs: Inputs, call: Call) -> list[tuple[tuple[int, ...], torch.dtype]]:
    tokens = math.prod(call.lead)
    return [((0,), call.dtype), ((tokens, call.rank), call.dtype), ((0,), call.dtype), ((0,), call.dtype)]
