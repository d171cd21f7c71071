"""One decoding step of a bottleneck adapter: y += scaling * mix(x @ A.T) @ B.T for a few tokens, without gradients."""

from gci_kernels.ops.decode.plan import MAX_TOKENS, choose_decode, has_kernels
from gci_kernels.ops.decode.step import add_update, find_step

__all__ = ["MAX_TOKENS", "add_update", "choose_decode", "find_step", "has_kernels"]
