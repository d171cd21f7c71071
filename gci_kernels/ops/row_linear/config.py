"""The launch configuration of row_linear's Triton kernel: a pure function of shape, dtype and chip."""

from dataclasses import dataclass

import torch

from gci_kernels.hardware.chips import chip_of_capability
from gci_kernels.ops.launching import block_size, ceil_div


@dataclass(frozen=True)
class RowLinearConfig:
    """Blocks of x @ W.T [tokens, width] and of its sum over the depth."""

    block_t: int
    block_n: int
    block_k: int
    group: int  # rows of tiles that share their rows of W in L2
    num_warps: int
    num_stages: int


def choose_row_linear_config(
    tokens: int, depth: int, width: int, dtype: torch.dtype, capability: str, sum_rows: bool
) -> RowLinearConfig:
    """For [tokens, depth] @ [depth, width]; `sum_rows`: the rows with two sources run along the sum.

    That costs registers, for which there is room: it has no say here, but tuning may find otherwise.
    """
    chip = chip_of_capability(capability)
    if dtype == torch.float32:  # no matrix units
        return RowLinearConfig(block_size(tokens, 16, 64), block_size(width, 16, 128), 16, 8, num_warps=8, num_stages=2)
    if depth % 16 or width % 16:  # read number by number, with a pointer for each: larger tiles would spill
        return RowLinearConfig(block_size(tokens, 16, 64), block_size(width, 16, 64), 32, 8, num_warps=4, num_stages=2)
    # Tiles and their order as in `expand`, for the same reasons.
    if chip.shared > 64 * 1024 and tokens > 64 and ceil_div(tokens, 128) * ceil_div(width, 256) >= chip.processors:
        block_k, num_stages = (64, 3) if chip.async_products else (32, 4)
        group = 8 if 2 * depth * (width + 8 * 128) <= chip.cache else 16
        return RowLinearConfig(128, 256, block_k, group, num_warps=8, num_stages=num_stages)
    block_t, num_stages = block_size(tokens, 16, 128), 4 if chip.shared > 64 * 1024 else 2
    return RowLinearConfig(block_t, block_size(width, 16, 128), 64, 8, 8 if block_t == 128 else 4, num_stages)
