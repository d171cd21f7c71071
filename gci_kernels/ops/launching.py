"""What launchers of GPU kernels share: the tensors that they accept, and arithmetic of launch configurations.

A launch configuration is a pure function of sizes, dtype and chip, in config.py beside an op's kernels. Nothing is
tuned while a model runs: the same call takes the same blocks, and so gives the same bits.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from gci_kernels.hardware.chips import chip_of_capability

#: Triton decides when a kernel is defined whether it is interpreted, so a later change of the variable means nothing.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Indices are int32 inside the kernels, and those of the last block, past the end, have to fit as well.
MAX_SIZE = 2**31 - 2**16
#: Of these, and of its own files, every Triton kernel is made: Kernel.files.
FILES = ("ops/launching.py", "hardware/chips.py", "hardware/gpus.py")


def check_tensors(dtypes: tuple[torch.dtype, ...] = DTYPES, /, **tensors: Tensor | None) -> None:
    """ValueError, with the argument's name, for a tensor that the kernels cannot take; None is passed over."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        # "meta" is for compiling without a GPU (bench/resources.py): nothing is launched there.
        if tensor.device.type not in ("cuda", "meta") and not INTERPRETED:
            raise ValueError(
                f"{name} must be on a GPU for a Triton kernel, got one on {tensor.device.type}; set TRITON_INTERPRET=1 "
                "before Python starts to interpret the kernels instead, slowly"
            )
        if tensor.dtype not in dtypes:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name} must be one of {allowed}, got {str(tensor.dtype).removeprefix('torch.')}")
        if tensor.dim() and max(tensor.shape) > MAX_SIZE:
            raise ValueError(f"no size of {name} may pass {MAX_SIZE}, got {list(tensor.shape)}")


def block_size(size: int, low: int, high: int) -> int:
    """The least power of two that holds `size`, within [low, high]; both bounds are powers of two."""
    return min(max(1 << max(size - 1, 0).bit_length(), low), high)


def ceil_div(size: int, block: int) -> int:
    """How many blocks hold `size`."""
    return -(-size // block)


def split_count(programs: int, tiles: int, steps: int) -> int:
    """How many programs share one tile's sum of `steps` steps, for no more than about `programs` programs in all.

    Each takes four steps at least, what fills a pipeline, and none is left without any.
    """
    splits = max(min(programs // max(tiles, 1), steps // 4, 64), 1)
    share = ceil_div(max(steps, 1), splits)
    return ceil_div(max(steps, 1), share)


@dataclass(frozen=True)
class ProductConfig:
    """Blocks of x @ w [tokens, width] and of its sum over the depth."""

    block_t: int
    block_n: int
    block_k: int
    group: int  # rows of tiles that share their columns of w in L2
    num_warps: int
    num_stages: int


#: What `gci-kernels tune` tries of a ProductConfig. The most important field is tried first.
PRODUCT_CANDIDATES = dict(
    block_t=(64, 128, 256), block_n=(64, 128, 256), block_k=(32, 64, 128), num_stages=(2, 3, 4, 5), num_warps=(4, 8),
    group=(4, 8, 16),
)  # fmt: skip


def choose_product_config(tokens: int, depth: int, width: int, dtype: torch.dtype, capability: str) -> ProductConfig:
    """For [tokens, depth] @ [depth, width]."""
    chip = chip_of_capability(capability)
    if dtype == torch.float32:  # no matrix units
        return ProductConfig(block_size(tokens, 16, 64), block_size(width, 16, 128), 16, 8, num_warps=8, num_stages=2)
    if depth % 16 or width % 16:  # loaded by element, with a pointer each: larger tiles would spill registers
        return ProductConfig(block_size(tokens, 16, 64), block_size(width, 16, 64), 32, 8, num_warps=4, num_stages=2)
    # The larger tile reads the fewest bytes for a product, if there is one for every multiprocessor.
    enough = ceil_div(tokens, 128) * ceil_div(width, 256) >= chip.processors
    if chip.shared > 64 * 1024 and tokens > 64 and enough:
        block_k, num_stages = (64, 3) if chip.async_products else (32, 4)
        # If w fits in the cache beside a few rows of x, nothing is read twice. Else the tiles that are computed at the
        # same time should form a square.
        group = 8 if 2 * depth * (width + 8 * 128) <= chip.cache else 16
        return ProductConfig(128, 256, block_k, group, num_warps=8, num_stages=num_stages)
    block_t, num_stages = block_size(tokens, 16, 128), 4 if chip.shared > 64 * 1024 else 2
    return ProductConfig(block_t, block_size(width, 16, 128), 64, 8, 8 if block_t == 128 else 4, num_stages)
