"""A decoding step of adapted layers: x @ W.T + b + scaling * mix(x @ A.T) @ B.T for a few tokens, no gradients."""

from gci_kernels.ops.decode import kernels as kernels
from gci_kernels.ops.decode import operators  # noqa: F401  # registers them
from gci_kernels.ops.decode.group import Group
from gci_kernels.ops.decode.plan import DecodePlan, choose_decode, has_kernels
from gci_kernels.ops.decode.step import find_step, plan_groups

__all__ = ["DecodePlan", "Group", "choose_decode", "find_step", "has_kernels", "plan_groups"]
