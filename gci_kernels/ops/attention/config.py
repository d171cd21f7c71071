"""Launch configurations of the Triton attention: pure functions of shape, dtype and chip."""

from dataclasses import dataclass

import torch

from gci_kernels.hardware.chips import chip_of_capability
from gci_kernels.limits import MAX_HEAD_SIZE
from gci_kernels.ops.launching import block_size


@dataclass(frozen=True)
class Tile:
    """What one program has at a time: the scores of `block_t` queries and `block_k` keys."""

    block_t: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionConfig:
    """A tile for each of the three kernels: forward, backward to q, and backward to k and v."""

    block_d: int  # columns of a head, padded to what a matrix unit takes
    chunk: int  # positions read at a time while a program looks for its segments
    fwd: Tile
    dq: Tile
    dkv: Tile


def choose_attention_config(r: int, num_heads: int, dtype: torch.dtype, capability: str) -> AttentionConfig:
    """Tiles do not depend on batch or length: a sequence gives the same bits in any batch, and nothing compiles again.

    A smaller tile would be no faster for a few queries: 64 rows are 16 for each of four warps, and a matrix unit takes
    16. Tiles are the largest whose scores, and in the backward pass those of do @ v.T too, leave registers for several
    programs on a multiprocessor, of which one computes exponentials while another waits for its products.
    """
    chip, block_d = chip_of_capability(capability), block_size(r // num_heads, 16, MAX_HEAD_SIZE)
    if dtype == torch.float32:  # no matrix units: both sides of a product are in registers too
        fwd, dq, dkv = (32, 32), (32, 32), (32 if block_d == 16 else 16, 32)
    elif chip.shared <= 64 * 1024:
        fwd, dq, dkv = (64, 32), (64, 32), (32, 64)
    elif block_d == 64 and not chip.async_products:
        fwd, dq, dkv = (64, 64), (64, 32), (32, 64)
    else:
        fwd, dq, dkv = (64, 64), (64, 64), (64, 64)
    # Two stages: computing one step takes as long as loading the next.
    tiles = (Tile(block_t, block_k, num_warps=4, num_stages=2) for block_t, block_k in (fwd, dq, dkv))
    return AttentionConfig(block_d, 1024, *tiles)
