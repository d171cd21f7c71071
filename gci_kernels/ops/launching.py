"""What launchers of GPU kernels share: the tensors that they accept, and arithmetic of launch configurations.

A launch configuration is a pure function of sizes, dtype and chip, in config.py beside an op's kernels. Nothing is
tuned while a model runs: the same call takes the same blocks, and so gives the same bits.
"""

import os

import torch
from torch import Tensor

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
