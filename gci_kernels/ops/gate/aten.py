"""The gate in library calls with a hand-written backward; any device, any floating dtype."""

import torch
from torch import Tensor

from gci_kernels.ops.gate import reference


def _split(projected: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """h [tokens, num_experts, r] and the logits [tokens, num_experts], both in the sums' dtype."""
    wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
    width = projected.shape[1] - num_experts
    return wide[:, :width].unflatten(1, (num_experts, width // num_experts)), wide[:, width:]


def forward(
    projected: Tensor, num_experts: int, top_k: int, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """u = scaling * gates * h, and the gates.

    Args:
        projected: [tokens, num_experts*r + num_experts], any floating dtype and device.
        num_experts: at least 1.
        top_k: how many gates of a token are kept, at most num_experts.
        scaling: the adapter's factor.
        dtype: of u.

    Returns:
        u [tokens, num_experts*r] in `dtype`; gates [tokens, num_experts] in float32, float64 where `projected` is.
    """
    h, logits = _split(projected, num_experts)
    gates = reference.gates(logits, top_k)
    u = h * (scaling * gates).unsqueeze(-1)
    return u.flatten(1).to(dtype), gates


def backward(
    du: Tensor, dgates: Tensor | None, projected: Tensor, num_experts: int, top_k: int, scaling: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of `projected`, in `dtype`, and u recomputed.

    Args:
        du: [tokens, num_experts*r], u's gradient, any floating dtype.
        dgates: [tokens, num_experts] in the gates' dtype, or None for zeros.
        projected, num_experts, top_k, scaling, dtype: what :func:`forward` was given.
    """
    h, logits = _split(projected, num_experts)
    gates = reference.gates(logits, top_k)
    du = du.to(h.dtype).view_as(h)
    factor = (scaling * gates).unsqueeze(-1)
    dgate = scaling * (du * h).sum(-1)
    if dgates is not None:
        dgate += dgates
    dlogits = gates * (dgate - (gates * dgate).sum(-1, keepdim=True))
    dprojected = torch.cat(((factor * du).flatten(1), dlogits), dim=1)
    return dprojected.to(dtype), (factor * h).flatten(1).to(dtype)
