"""Launch configurations of the bottleneck's Triton kernels: pure functions of shape, dtype and chip.

`capability` is the compiler's name of the architecture ("sm_90", "gfx942"); hardware/chips.py has its limits.
"""

from dataclasses import dataclass, replace

import torch

from gci_kernels.hardware.chips import chip_of_capability
from gci_kernels.ops.launching import ProductConfig, block_size, ceil_div, choose_product_config, split_count


@dataclass(frozen=True)
class ProjectConfig:
    """Blocks of x [tokens, depth] @ m [depth, columns] and of its result."""

    block_t: int
    block_n: int
    block_k: int
    splits: int  # of the depth
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpandConfig(ProductConfig):
    """Blocks of x @ w + u @ m [tokens, width]: those of the first product, and of the second's sum over the rank."""

    block_r: int
    descriptors: bool = False  # whole tiles by the copy engine, where the layout allows
    persistent: bool = False  # then by expand_persistent.py


@dataclass(frozen=True)
class ReduceConfig:
    """Blocks of u.T @ y [rank, width], a sum over the tokens; and of y @ m where both come from one reading of y."""

    block_t: int
    block_r: int
    block_n: int
    splits: int  # of the tokens
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DropoutConfig:
    """A block of x [tokens, columns]."""

    block_t: int
    block_c: int
    num_warps: int


def choose_project_config(tokens: int, depth: int, rank: int, dtype: torch.dtype, capability: str) -> ProjectConfig:
    """For [tokens, depth] @ [depth, rank]. All of the rank in one tile, up to 128, so that x is read once."""
    half = dtype != torch.float32
    block_t, block_n = block_size(tokens, 16, 64 if half else 128), block_size(rank, 16, 128 if half else 64)
    block_k = (32 if depth % 16 else 128 if block_n <= 32 else 64) if half else 16
    if half and chip_of_capability(capability).shared <= 64 * 1024:
        block_k //= 2
    tiles = ceil_div(tokens, block_t) * ceil_div(rank, block_n)
    # With two programs on a multiprocessor, one computes while the other starts.
    splits = split_count(2 * chip_of_capability(capability).processors, tiles, ceil_div(depth, block_k))
    num_warps, num_stages = 8 if block_n >= (64 if half else 32) else 4, 3 if half else 2
    return ProjectConfig(block_t, block_n, block_k, splits, num_warps, num_stages)


def choose_expand_config(
    tokens: int, depth: int, width: int, rank: int, dtype: torch.dtype, capability: str, dropout: bool = False
) -> ExpandConfig:
    """For [tokens, depth] @ [depth, width] + [tokens, rank] @ [rank, width], `dropout` on the second product."""
    chip = chip_of_capability(capability)
    product = choose_product_config(tokens, depth, width, dtype, capability)
    matrix_units = dtype != torch.float32 and depth % 16 == width % 16 == 0
    descriptors = matrix_units and chip.async_products and product.block_t >= 64
    # On Hopper alone: for Blackwell, Triton 3.7 does not compile the two loops of the persistent kernel into one. Where
    # the rank takes two steps, or with a mask, its products would run one by one. It stores quarters of a tile, whose
    # rows have to be 16 bytes at least.
    if descriptors and chip.capability == "sm_90" and not dropout and rank <= 64 and product.block_n >= 64:
        # Of 227 KiB, a stage of the largest tiles takes 48, a quarter of a tile of y 16, and 16 of the rank 12.
        block_r = block_size(rank, 16, 64)
        product = replace(product, num_stages=4 if block_r == 16 else 3)
        return ExpandConfig(**vars(product), block_r=block_r, descriptors=True, persistent=True)
    # A step over the rank rounds its rows of m in registers, beside all the sums: 16 rows fit.
    return ExpandConfig(**vars(product), block_r=16, descriptors=descriptors)


def choose_reduce_config(tokens: int, rank: int, width: int, dtype: torch.dtype, capability: str) -> ReduceConfig:
    """For [tokens, rank].T @ [tokens, width]. All of the rank in one tile, up to 128, so that y is read once."""
    chip, half = chip_of_capability(capability), dtype != torch.float32
    whole_rows = half and chip.async_products and width % 16 == 0
    block_t = 16 if not half else 64 if whole_rows else 32
    block_r = block_size(rank, 16, 128 if half else 64)
    # Wide tiles are few, and leave few partial sums for the second stage to read.
    block_n = block_size(width, 16, 256 if whole_rows and block_r <= 64 else 128 if half else 64)
    tiles = ceil_div(width, block_n) * ceil_div(rank, block_r)
    splits = split_count((1 if block_n == 256 else 2) * chip.processors, tiles, ceil_div(tokens, block_t))
    num_warps = 8 if block_r >= 64 else 4
    return ReduceConfig(block_t, block_r, block_n, splits, num_warps, num_stages=3)


def choose_project_reduce_config(
    tokens: int, width: int, rank: int, dtype: torch.dtype, capability: str
) -> ReduceConfig | None:
    """For y @ m and u.T @ y, y [tokens, width], from one reading of y; None where two are faster."""
    chip, block_r = chip_of_capability(capability), block_size(rank, 16, 128)
    if dtype == torch.float32 or rank > block_r or width % 16:
        return None
    if chip.shared <= 64 * 1024 and rank > 16:  # m stays in registers from the first step to the last
        return None
    narrow = chip.async_products and block_r <= 16
    block_t = block_size(tokens, 16, 64 if chip.shared > 64 * 1024 else 32)
    # The widest blocks with which programs fill half the chip.
    wide = (512, 256) if narrow else (256,) if block_r <= 64 else (128,)
    for block_n in (block_size(width, 16, most) for most in wide):
        tiles = ceil_div(width, block_n)
        splits = split_count(chip.processors, tiles, ceil_div(tokens, block_t))
        if 2 * tiles * splits >= chip.processors:
            break
    # Partial sums are float32, written once and read once; y has two bytes a number.
    more_bytes = 8 * rank * (tiles * tokens + splits * width) >= 2 * tokens * width
    if more_bytes or 2 * tiles * splits < chip.processors:
        return None
    # The fewer warps share a narrow product, the fewer read all of y for it. On Hopper a third stage is what lets the
    # next tile be read during the products.
    num_warps = 4 if narrow else 8
    return ReduceConfig(block_t, block_r, block_n, splits, num_warps, num_stages=3 if chip.async_products else 2)


def choose_dropout_config(tokens: int, width: int) -> DropoutConfig:
    """Blocks of at most 2,048 numbers, of which a thread makes 16."""
    block_c = block_size(width, 16, 512)
    return DropoutConfig(block_size(tokens, 1, 2048 // block_c), block_c, num_warps=4)
