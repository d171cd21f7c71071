"""The launch configuration of the gate's Triton kernels: a pure function of shape."""

from dataclasses import dataclass

from gci_kernels.limits import MAX_EXPERTS
from gci_kernels.ops.launching import block_size


@dataclass(frozen=True)
class GateConfig:
    """A block [tokens, experts, part of r]."""

    block_t: int
    block_e: int
    block_r: int
    num_warps: int


def choose_gate_config(tokens: int, experts: int, r: int) -> GateConfig:
    """Tiles of at most 2,048 numbers, 16 a thread, cut along r first and then along the tokens."""
    block_e = block_size(experts, 1, MAX_EXPERTS)
    block_r = block_size(r, 1, 2048 // block_e)
    return GateConfig(block_size(tokens, 1, 2048 // (block_e * block_r)), block_e, block_r, num_warps=4)
