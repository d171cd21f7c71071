"""The products of a linear layer with trained rows as library products; any device, any floating dtype.

Three forms, by where the active rows are: "kept", weight holds them already; "merge", they are copied into a copy of
weight for this product alone; "overwrite", weight's own rows are used, and what they gave is replaced. Tensors are
[tokens, features]; `active` [k, in] comes in any floating dtype and is used in the other operand's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def merge(weight: Tensor, active: Tensor, positions: Tensor) -> Tensor:
    """A copy of weight, contiguous, with the active rows at their positions."""
    copy = weight.clone(memory_format=torch.contiguous_format)
    return copy.index_copy_(0, positions, active.to(copy.dtype))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, positions: Tensor, form: str) -> Tensor:
    """x @ W'.T + bias."""
    if form != "overwrite":
        return F.linear(x, weight if form == "kept" else merge(weight, active, positions), bias)
    y = F.linear(x, weight, bias)
    own_bias = None if bias is None else bias.index_select(0, positions)
    return y.index_copy_(1, positions, F.linear(x, active.to(x.dtype), own_bias))


def dx(dy: Tensor, weight: Tensor, active: Tensor, positions: Tensor, chosen: Tensor, form: str) -> Tensor:
    """dy @ W'; `chosen` [tokens, k]: dy's columns at `positions`."""
    if form != "overwrite":
        return torch.mm(dy, weight if form == "kept" else merge(weight, active, positions))
    return torch.mm(dy.index_fill(1, positions, 0), weight).addmm_(chosen, active.to(dy.dtype))
