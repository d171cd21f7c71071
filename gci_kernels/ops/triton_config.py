"""Launch configurations of the Triton kernels: pure functions of shape, dtype and chip; and what launchers accept.

Nothing is tuned while a model runs: the same call takes the same blocks, and so gives the same bits, every time.
`capability` is the compiler's name of the architecture ("sm_90", "gfx942"); hardware/chips.py says what stands for it.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from gci_kernels.hardware.chips import chip_of_capability as chip
from gci_kernels.hardware.device import device_capability as device_capability

#: Triton decides when a kernel is defined whether it is interpreted, so a later change of the variable means nothing.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Indices are int32 inside the kernels, and those of the last block, past the end, have to fit as well.
MAX_SIZE = 2**31 - 2**16


@dataclass(frozen=True)
class ProjectConfig:
    block_t: int
    block_n: int
    block_k: int
    splits: int  # of the depth
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpandConfig:
    block_t: int
    block_n: int
    block_k: int
    block_r: int
    group: int  # rows of tiles that share their columns of w in L2
    num_warps: int
    num_stages: int
    descriptors: bool = False  # whole tiles by the copy engine, where the layout allows


@dataclass(frozen=True)
class RowLinearConfig:
    block_t: int
    block_n: int
    block_k: int
    group: int  # rows of tiles that share their rows of W in L2
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ProjectReduceConfig:
    block_t: int
    block_n: int
    block_r: int
    splits: int  # of the tokens
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ReduceConfig:
    block_t: int
    block_r: int
    block_n: int
    splits: int  # of the tokens
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DropoutConfig:
    block_t: int
    block_c: int
    num_warps: int


@dataclass(frozen=True)
class GateConfig:
    block_t: int
    block_e: int
    block_r: int
    num_warps: int


def choose_project_config(
    tokens: int, depth: int, rank: int, dtype: torch.dtype, capability: str, dropout: bool = False
) -> ProjectConfig:
    """For [tokens, depth] @ [depth, rank]. All of the rank in one tile, up to 128, so that x is read once."""
    half = dtype != torch.float32
    block_t, block_n = _power(tokens, 16, 64 if half else 128), _power(rank, 16, 128 if half else 64)
    block_k = (32 if depth % 16 else 128 if block_n <= 32 else 64) if half else 16
    if half and chip(capability).shared <= 64 * 1024:
        block_k //= 2
    tiles = _blocks(tokens, block_t) * _blocks(rank, block_n)
    # Two programs a processor hide each other's start.
    splits = _splits(2 * chip(capability).processors, tiles, _blocks(depth, block_k))
    num_warps, num_stages = 8 if block_n >= (64 if half else 32) or dropout else 4, 3 if half else 2
    return ProjectConfig(block_t, block_n, block_k, splits, num_warps, num_stages)


def choose_expand_config(
    tokens: int, depth: int, width: int, rank: int, dtype: torch.dtype, capability: str, dropout: bool = False
) -> ExpandConfig:
    """For [tokens, depth] @ [depth, width] + [tokens, rank] @ [rank, width], `dropout` on the second product."""
    # A step of the rank holds its m in registers while it is rounded, beside all the sums: 16 rows are what fits.
    where, block_r = chip(capability), 16
    if dtype == torch.float32:  # no matrix units
        return ExpandConfig(_power(tokens, 16, 64), _power(width, 16, 128), 16, block_r, 8, num_warps=8, num_stages=2)
    if depth % 16 or width % 16:  # read number by number, with a pointer for each: larger tiles would spill
        return ExpandConfig(_power(tokens, 16, 64), _power(width, 16, 64), 32, block_r, 8, num_warps=4, num_stages=2)
    # The larger tile moves the fewest bytes a product, where there are enough of them for every processor. Its sums
    # leave no registers for making a mask.
    enough = _blocks(tokens, 128) * _blocks(width, 256) >= where.processors
    if where.shared > 64 * 1024 and tokens > 64 and enough and not dropout:
        block_k, num_stages = (64, 3) if where.async_products else (32, 4)
        # Where all of w stays in the cache beside a few rows of x, nothing is read twice. Where it does not, programs
        # that run together should form a square.
        group = 8 if 2 * depth * (width + 8 * 128) <= where.cache else 16
        return ExpandConfig(128, 256, block_k, block_r, group, 8, num_stages, descriptors=where.async_products)
    block_t, num_stages = _power(tokens, 16, 128), 4 if where.shared > 64 * 1024 else 2
    num_warps = 8 if block_t == 128 else 4
    descriptors = where.async_products and block_t >= 64
    return ExpandConfig(block_t, _power(width, 16, 128), 64, block_r, 8, num_warps, num_stages, descriptors)


def choose_row_linear_config(
    tokens: int, depth: int, width: int, dtype: torch.dtype, capability: str, sum_rows: bool
) -> RowLinearConfig:
    """For [tokens, depth] @ [depth, width]; `sum_rows`: the rows with two sources run along the sum.

    That costs registers, for which there is room: it has no say here, but tuning may find otherwise.
    """
    where = chip(capability)
    if dtype == torch.float32:  # no matrix units
        return RowLinearConfig(_power(tokens, 16, 64), _power(width, 16, 128), 16, 8, num_warps=8, num_stages=2)
    if depth % 16 or width % 16:  # read number by number, with a pointer for each: larger tiles would spill
        return RowLinearConfig(_power(tokens, 16, 64), _power(width, 16, 64), 32, 8, num_warps=4, num_stages=2)
    # Tiles and their order as in `expand`, for the same reasons.
    if where.shared > 64 * 1024 and tokens > 64 and _blocks(tokens, 128) * _blocks(width, 256) >= where.processors:
        block_k, num_stages = (64, 3) if where.async_products else (32, 4)
        group = 8 if 2 * depth * (width + 8 * 128) <= where.cache else 16
        return RowLinearConfig(128, 256, block_k, group, num_warps=8, num_stages=num_stages)
    block_t, num_stages = _power(tokens, 16, 128), 4 if where.shared > 64 * 1024 else 2
    return RowLinearConfig(block_t, _power(width, 16, 128), 64, 8, 8 if block_t == 128 else 4, num_stages)


def choose_reduce_config(
    tokens: int, rank: int, width: int, dtype: torch.dtype, capability: str, dropout: bool = False
) -> ReduceConfig:
    """For [tokens, rank].T @ [tokens, width]. All of the rank in one tile, up to 128, so that y is read once."""
    where, half = chip(capability), dtype != torch.float32
    whole_rows = half and where.async_products and width % 16 == 0
    block_t = 16 if not half else 64 if whole_rows else 32
    block_r = _power(rank, 16, 128 if half else 64)
    # A wide tile means few tiles, and so few partial sums for the second stage to read.
    block_n = _power(width, 16, 256 if whole_rows and block_r <= 64 else 128 if half else 64)
    tiles = _blocks(width, block_n) * _blocks(rank, block_r)
    splits = _splits((1 if block_n == 256 else 2) * where.processors, tiles, _blocks(tokens, block_t))
    num_warps = 8 if block_r >= 64 or dropout else 4
    return ReduceConfig(block_t, block_r, block_n, splits, num_warps, num_stages=3)


def choose_project_reduce_config(
    tokens: int, width: int, rank: int, dtype: torch.dtype, capability: str
) -> ProjectReduceConfig | None:
    """For y @ m and u.T @ y, y [tokens, width], from one reading of y; None where two are faster."""
    where, block_r = chip(capability), _power(rank, 16, 128)
    if dtype == torch.float32 or rank > block_r or width % 16:
        return None
    if where.shared <= 64 * 1024 and rank > 16:  # m stays in registers from the first step to the last
        return None
    large = where.async_products and block_r <= 32
    block_t = _power(tokens, 16, 64 if where.shared > 64 * 1024 else 32)
    block_n = _power(width, 16, 512 if large else 256 if block_r <= 64 else 128)
    tiles = _blocks(width, block_n)
    splits = _splits(where.processors, tiles, _blocks(tokens, block_t))
    # Partial sums are float32, written once and read once; y has two bytes a number.
    more_bytes = 8 * rank * (tiles * tokens + splits * width) >= 2 * tokens * width
    if more_bytes or 2 * tiles * splits < where.processors:
        return None
    return ProjectReduceConfig(block_t, block_n, block_r, splits, num_warps=8, num_stages=2)


def choose_dropout_config(tokens: int, width: int) -> DropoutConfig:
    block_c = _power(width, 16, 512)
    return DropoutConfig(_power(tokens, 1, 2048 // block_c), block_c, num_warps=4)


def choose_gate_config(tokens: int, experts: int, r: int) -> GateConfig:
    """Tiles of at most 2,048 numbers, 16 a thread, cut along r first and then along the tokens."""
    block_e = _power(experts, 1, 256)
    block_r = _power(r, 1, 2048 // block_e)
    return GateConfig(_power(tokens, 1, 2048 // (block_e * block_r)), block_e, block_r, num_warps=4)


def check_tensors(dtypes: tuple[torch.dtype, ...] = DTYPES, **tensors: Tensor | None) -> None:
    """ValueError, with the argument's name, for a tensor that the kernels cannot take."""
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


def _power(size: int, low: int, high: int) -> int:
    """The least power of two that holds `size`, within [low, high]; all three bounds are powers of two."""
    return min(max(1 << max(size - 1, 0).bit_length(), low), high)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _splits(wanted: int, tiles: int, steps: int) -> int:
    """How many programs share one tile's sum of `steps` steps, for no more than about `wanted` programs in all.

    Each takes four steps at least, what fills a pipeline, and none is left without any.
    """
    splits = max(min(wanted // max(tiles, 1), steps // 4, 64), 1)
    share = _blocks(max(steps, 1), splits)
    return _blocks(max(steps, 1), share)
