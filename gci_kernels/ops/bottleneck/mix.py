"""The mixers: what stands between `project` and `expand`. An adapter of this family is a mixer and nothing else."""

import torch
from torch import Tensor

from gci_kernels.ops.gate import aten as gate_aten
from gci_kernels.ops.gate import native as gate_native

_GATE = {"aten": gate_aten, "native": gate_native}


def forward(
    projected: Tensor, num_experts: int, top_k: int, scaling: float, dtype: torch.dtype, impl: str
) -> tuple[Tensor, Tensor]:
    """u [tokens, R] in `dtype`, with the scaling in it, and the gates; num_experts = 0: the identity, no gates."""
    if num_experts == 0:
        return (projected * scaling).to(dtype), projected.new_empty(0)
    return _GATE[impl].forward(projected, num_experts, top_k, scaling, dtype)


def backward(
    du: Tensor, dgates: Tensor | None, projected: Tensor, num_experts: int, top_k: int, scaling: float,
    dtype: torch.dtype, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dprojected, u) in `dtype`: the gradient of everything `project` made, and u once more, for the gradient of B."""
    if num_experts == 0:
        return (du * scaling).to(dtype), (projected * scaling).to(dtype)
    return _GATE[impl].backward(du, dgates, projected, num_experts, top_k, scaling, dtype)
