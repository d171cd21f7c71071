"""The linear layer with trained rows in library products; any device, any floating dtype.

It has three forms: with "kept", the weight that is given holds the active rows already; with "merge", the weight is
copied and the active rows are written into the copy, for one product; with "overwrite", the frozen weight is used, and
the outputs of its rows at the active positions are replaced.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gci_kernels.ops.row_linear.plan import padded


def merge(weight: Tensor, active: Tensor, positions: Tensor) -> Tensor:
    """A contiguous copy of `weight` [out, in] with the rows at `positions` [k] replaced by `active` [k, in]."""
    copy = weight.clone(memory_format=torch.contiguous_format)
    return copy.index_copy_(0, positions, active.to(copy.dtype))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, positions: Tensor, form: str) -> Tensor:
    """x @ W'.T + bias, [tokens, out] in x's dtype.

    Args:
        x: [tokens, in], any floating dtype and device.
        weight: [out, in] in x's dtype.
        bias: [out] in x's dtype, or None.
        active: [k, in], any floating dtype; used in x's.
        positions: [k] int64, the rows of W' that `active` holds.
        form: "kept", "merge" or "overwrite".
    """
    if form != "overwrite":
        return F.linear(x, weight if form == "kept" else merge(weight, active, positions), bias)
    y = F.linear(x, weight, bias)
    own_bias = None if bias is None else bias.index_select(0, positions)
    return y.index_copy_(1, positions, _active_columns(x, active.to(x.dtype), own_bias))


def _active_columns(x: Tensor, active: Tensor, bias: Tensor | None) -> Tensor:
    """x @ active.T + bias, [tokens, k], on a GPU within rows that start at multiples of 16 bytes."""
    k = active.shape[0]
    width = padded(k, x.device.type)
    if width == k:
        return F.linear(x, active, bias)
    y = x.new_empty(x.shape[0], width)[:, :k]
    return torch.mm(x, active.t(), out=y) if bias is None else torch.addmm(bias, x, active.t(), out=y)


def dx(dy: Tensor, weight: Tensor, active: Tensor, positions: Tensor, dy_active: Tensor, form: str) -> Tensor:
    """dy @ W', [tokens, in] in dy's dtype.

    Args:
        dy: [tokens, out], the output's gradient.
        weight, active, positions, form: what :func:`forward` was given.
        dy_active: [tokens, k], dy's columns at `positions`.
    """
    if form != "overwrite":
        return torch.mm(dy, weight if form == "kept" else merge(weight, active, positions))
    return torch.mm(dy.index_fill(1, positions, 0), weight).addmm_(dy_active, active.to(dy.dtype))
