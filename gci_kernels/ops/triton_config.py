"""Launch configurations of the Triton kernels: pure functions of shape, dtype and chip; and what launchers accept.

Nothing is tuned while a model runs: the same call takes the same blocks, and so gives the same bits, every time.
`capability` is the compiler's name of the chip: "sm_80", "sm_90", "sm_100", "gfx942"; any other is taken for small.
"""

import functools
import os
from dataclasses import dataclass

import torch
from torch import Tensor

#: Triton decides when a kernel is defined whether it is interpreted, so a later change of the variable means nothing.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Indices are int32 inside the kernels, and those of the last block, past the end, have to fit as well.
MAX_SIZE = 2**31 - 2**16


@dataclass(frozen=True)
class Chip:
    """What the choice depends on: how many programs keep it busy, and the shared memory one of them may take."""

    processors: int
    shared: int
    async_products: bool  # matrix units read their operands from shared memory, and registers hold the sums alone


_CHIPS = {
    "sm_80": Chip(108, 163 * 1024, False),
    "sm_90": Chip(132, 227 * 1024, True),
    "sm_100": Chip(148, 227 * 1024, True),
    "gfx942": Chip(304, 64 * 1024, False),
}
_SMALL_CHIP = Chip(64, 64 * 1024, False)


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


def chip(capability: str) -> Chip:
    return _CHIPS.get(capability, _SMALL_CHIP)


def choose_project_config(tokens: int, depth: int, rank: int, dtype: torch.dtype, capability: str) -> ProjectConfig:
    """For [tokens, depth] @ [depth, rank]. All of the rank in one tile, up to 128, so that x is read once."""
    half = dtype != torch.float32
    block_t, block_n = _power(tokens, 16, 64 if half else 128), _power(rank, 16, 128 if half else 64)
    block_k = (32 if depth % 16 else 128 if block_n <= 32 else 64) if half else 16
    if half and chip(capability).shared <= 64 * 1024:
        block_k //= 2
    tiles = _blocks(tokens, block_t) * _blocks(rank, block_n)
    # Two programs a processor hide each other's start; four steps of the loop are what fills a pipeline.
    splits = _splits(2 * chip(capability).processors, tiles, _blocks(depth, 4 * block_k))
    num_warps, num_stages = 8 if block_n >= (64 if half else 32) else 4, 3 if half else 2
    return ProjectConfig(block_t, block_n, block_k, splits, num_warps, num_stages)


def choose_expand_config(
    tokens: int, depth: int, width: int, rank: int, dtype: torch.dtype, capability: str
) -> ExpandConfig:
    """For [tokens, depth] @ [depth, width] + [tokens, rank] @ [rank, width]."""
    where, block_r = chip(capability), 16
    if dtype == torch.float32:  # no matrix units
        return ExpandConfig(_power(tokens, 16, 64), _power(width, 16, 128), 16, block_r, 8, num_warps=8, num_stages=2)
    if depth % 16 or width % 16:  # read number by number, with a pointer for each: larger tiles would spill
        return ExpandConfig(_power(tokens, 16, 64), _power(width, 16, 64), 32, block_r, 8, num_warps=4, num_stages=2)
    if where.async_products:
        # A step of the rank holds m in registers while it is rounded: more than 32 rows of 256 float32 would spill.
        block_r = _power(rank, 16, 32)
    # The larger tile moves the fewest bytes a product, where there are enough of them for every processor.
    if where.shared > 64 * 1024 and tokens > 64 and _blocks(tokens, 128) * _blocks(width, 256) >= where.processors:
        block_k, num_stages = (64, 3) if where.async_products else (32, 4)
        return ExpandConfig(128, 256, block_k, block_r, 8, num_warps=8, num_stages=num_stages)
    block_t, num_stages = _power(tokens, 16, 128), 4 if where.shared > 64 * 1024 else 2
    num_warps = 8 if block_t == 128 else 4
    return ExpandConfig(block_t, _power(width, 16, 128), 64, block_r, 8, num_warps, num_stages)


def choose_reduce_config(tokens: int, rank: int, width: int, dtype: torch.dtype, capability: str) -> ReduceConfig:
    """For [tokens, rank].T @ [tokens, width]. All of the rank in one tile, up to 128, so that y is read once."""
    half = dtype != torch.float32
    block_t = 16 if not half else 64 if chip(capability).async_products and width % 16 == 0 else 32
    block_r, block_n = _power(rank, 16, 128 if half else 64), _power(width, 16, 128 if half else 64)
    tiles = _blocks(width, block_n) * _blocks(rank, block_r)
    splits = _splits(2 * chip(capability).processors, tiles, _blocks(tokens, 4 * block_t))
    return ReduceConfig(block_t, block_r, block_n, splits, num_warps=8 if block_r >= 64 else 4, num_stages=3)


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


@functools.cache
def device_capability(device: torch.device) -> str:
    """The compiler's name of the chip; "sm_90" where the kernels are interpreted."""
    if device.type != "cuda":
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _power(size: int, low: int, high: int) -> int:
    """The least power of two that holds `size`, within [low, high]; all three bounds are powers of two."""
    return min(max(1 << max(size - 1, 0).bit_length(), low), high)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _splits(wanted: int, tiles: int, most: int) -> int:
    """How many programs share one tile's sum: a power of two, at most `most` and 64, for `wanted` programs in all."""
    splits = 1
    while splits < 64 and 2 * splits <= most and splits * tiles < wanted:
        splits *= 2
    return splits
