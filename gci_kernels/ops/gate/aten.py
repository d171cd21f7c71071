"""The gate in library calls, any device: forward and a hand-written backward (signatures: the package's docstring)."""

import torch
from torch import Tensor

from gci_kernels.ops.gate import reference


def _split(projected: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """h [tokens, num_experts, r] and the logits [tokens, num_experts], in the dtype sums are kept in."""
    wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
    width = projected.shape[1] - num_experts
    return wide[:, :width].unflatten(1, (num_experts, width // num_experts)), wide[:, width:]


def forward(
    projected: Tensor, num_experts: int, top_k: int, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    h, logits = _split(projected, num_experts)
    gates = reference.gates(logits, top_k)
    u = h * (scaling * gates).unsqueeze(-1)
    return u.flatten(1).to(dtype), gates


def backward(
    du: Tensor, dgates: Tensor | None, projected: Tensor, num_experts: int, top_k: int, scaling: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h, logits = _split(projected, num_experts)
    gates = reference.gates(logits, top_k)
    wide_du = du.to(h.dtype).view_as(h)
    factor = (scaling * gates).unsqueeze(-1)
    dgate = scaling * (wide_du * h).sum(-1)
    if dgates is not None:
        dgate += dgates
    dlogits = gates * (dgate - (gates * dgate).sum(-1, keepdim=True))
    dprojected = torch.cat(((factor * wide_du).flatten(1), dlogits), dim=1)
    return dprojected.to(dtype), (factor * h).flatten(1).to(dtype)
