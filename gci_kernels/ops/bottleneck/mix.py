"""The mixers: what stands between `project` and `expand`. An adapter of this family is a mixer and nothing else."""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor


@functools.cache
def _gate(impl: str) -> ModuleType:
    """The gate's module aten.py, native.py or triton.py; loaded when a plan first names it."""
    return importlib.import_module(f"gci_kernels.ops.gate.{impl}")


def forward(
    projected: Tensor, num_experts: int, top_k: int, scaling: float, dtype: torch.dtype, impl: str
) -> tuple[Tensor, Tensor]:
    """u [tokens, R] in `dtype`, with the scaling in it, and the gates; num_experts = 0: the identity, no gates."""
    if num_experts == 0:
        return (projected * scaling).to(dtype), projected.new_empty(0)
    return _gate(impl).forward(projected, num_experts, top_k, scaling, dtype)


def backward(
    du: Tensor, dgates: Tensor | None, projected: Tensor, num_experts: int, top_k: int, scaling: float,
    dtype: torch.dtype, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dprojected, u) in `dtype`: the gradient of everything `project` made, and u once more, for the gradient of B."""
    if num_experts == 0:
        return (du * scaling).to(dtype), (projected * scaling).to(dtype)
    return _gate(impl).backward(du, dgates, projected, num_experts, top_k, scaling, dtype)
