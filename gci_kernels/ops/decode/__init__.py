"""A decoding step of adapted layers: x @ W.T + b + scaling * mix(x @ A.T) @ B.T for a few tokens, no gradients."""

from gci_kernels.ops.decode import kernels as kernels
from gci_kernels.ops.decode.api import find_step
from gci_kernels.ops.decode.group import Group
from gci_kernels.ops.decode.plan import MAX_TOKENS, DecodePlan, choose_decode, has_kernels
from gci_kernels.ops.decode.step import plan_groups

__all__ = ["MAX_TOKENS", "DecodePlan", "Group", "choose_decode", "find_step", "has_kernels", "plan_groups"]
