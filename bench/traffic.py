"""What a plan moves, in bytes, counted from the plan itself.

The op runs on torch's "meta" device, and every kernel it launches and every torch operation it calls is an entry. The
big product's tiles are walked through a cache of the chip's size; what is small enough to stay there, the adapter's own
tensors, counts once.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .launches import TRITON, Call, record, training_step
from .roofline import Case, Chip, Entry

PLANS = {"triton": TRITON, "aten": "/".join(["aten"] * 5)}


def count(
    case: Case, dtype: torch.dtype, adapter_dtype: torch.dtype, chip: Chip, *, plan: str = TRITON
) -> tuple[list[Entry], list[int]]:
    """What forward and backward under `plan` move on `chip`, in order; and the bytes of each tensor they allocate."""
    entries: list[Entry] = []
    allocated: list[int] = []
    directions = training_step(case, dtype, adapter_dtype, plan=plan)
    for name, direction in zip(("forward", "backward"), directions, strict=True):
        operations = _Operations(name)

        def step(direction: Callable[[], None] = direction, operations: _Operations = operations) -> None:
            with operations:
                direction()

        calls = record(step, chip.capability)
        entries += [_entry(f"{name}: {call.launch.name}", call, chip) for call in calls]
        entries += operations.entries
        allocated += operations.allocated
    return entries, allocated


class _Operations(TorchDispatchMode):
    """Every torch operation that computes, with the bytes of its operands and results; and what is allocated."""

    def __init__(self, direction: str):
        super().__init__()
        self.direction = direction
        self.entries: list[Entry] = []
        self.allocated: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # Autograd is not told that the second is a view, and it moves as little.
        if func.is_view or func is torch.ops.aten._unsafe_view.default or not isinstance(result, Tensor):
            return result
        inputs = [arg for arg in torch.utils._pytree.tree_leaves((args, kwargs or {})) if isinstance(arg, Tensor)]
        in_place = any(result is arg for arg in inputs)
        if not in_place:
            self.allocated.append(_bytes(result))
        name = func._schema.name.removeprefix("aten::")
        if "empty" not in name:
            operations = 0
            if name in ("mm", "addmm", "addmm_"):
                left = inputs[-2]
                operations = 2 * left.shape[0] * left.shape[1] * result.shape[1]
            # What is added to in place is read as an input and written as the result.
            self.entries.append(
                Entry(f"{self.direction}: {name}", sum(map(_bytes, inputs)) + _bytes(result), operations)
            )
        return result


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _entry(name: str, call: Call, chip: Chip) -> Entry:
    """Bytes and operations of one Triton launch."""
    kernel, given = call.launch.name, call.arguments
    tensors = {key: getattr(value, "base", value) for key, value in given.items() if key.endswith("_ptr")}
    size = {key.removesuffix("_ptr"): _bytes(tensor) for key, tensor in tensors.items()}
    if kernel == "expand_fwd":
        moved = _product_reads(call, size, chip) + size["u"] + size["m"] + size["y"]
        moved += size["bias"] if given["HAS_BIAS"] else 0
        operations = 2 * given["tokens"] * given["width"] * (given["depth"] + given["rank"])
    elif kernel in ("project_fwd", "reduce_fwd"):
        # Columns of the narrow side beyond one tile read the wide operand again.
        wide, narrow, columns = ("x", "m", "width") if kernel == "project_fwd" else ("y", "u", "rank")
        again = call.grid[1]
        moved = again * size[wide] + size[narrow] + size["out"]
        operations = 2 * (size[wide] // tensors[f"{wide}_ptr"].element_size()) * given[columns]
    elif kernel == "project_reduce_fwd":
        moved = sum(size.values())
        operations = 4 * given["tokens"] * given["width"] * given["rank"]
    elif kernel == "gate_bwd":
        moved, operations = sum(size.values()) - (0 if given["HAS_DGATES"] else size["dgates"]), 0
    elif kernel in ("gate_fwd", "sum_splits", "dropout_fwd"):
        moved, operations = sum(size.values()), 0
    else:
        raise ValueError(f"{kernel} has no count of its bytes in roofline.py")
    return Entry(name, moved, operations)


def _product_reads(call: Call, size: dict[str, int], chip: Chip) -> float:
    """Bytes of x and w that the base product reads from memory: its tiles in launch order through a cache (LRU).

    As many programs as the chip has processors run side by side and walk the depth in step, so each reads its rows of x
    and its columns of w a slice at a time, and a slice is read from memory unless the cache still holds it.
    """
    given = call.arguments
    if not given["HAS_BASE"]:
        return 0
    tiles_t, tiles_n = -(-given["tokens"] // given["BLOCK_T"]), -(-given["width"] // given["BLOCK_N"])
    slices = 16
    slice_x, slice_w = size["x"] / tiles_t / slices, size["w"] / tiles_n / slices
    cache: OrderedDict[tuple, float] = OrderedDict()
    held = moved = 0.0
    for first in range(0, tiles_t * tiles_n, chip.processors):
        wave = range(first, min(first + chip.processors, tiles_t * tiles_n))
        tiles = [_tile(pid, tiles_t, tiles_n, given["GROUP"]) for pid in wave]
        for depth in range(slices):
            touched = {("x", t, depth): slice_x for t, _ in tiles} | {("w", n, depth): slice_w for _, n in tiles}
            for key, amount in touched.items():
                if key not in cache:
                    moved, held = moved + amount, held + amount
                cache[key] = amount
                cache.move_to_end(key)
            while held > chip.cache:
                held -= cache.popitem(last=False)[1]
    return moved


def _tile(pid: int, tiles_t: int, tiles_n: int, group: int) -> tuple[int, int]:
    """Row and column of a program's tile, the order of expand.py."""
    first = pid // (group * tiles_n) * group
    rows = min(tiles_t - first, group)
    return first + pid % (group * tiles_n) % rows, pid % (group * tiles_n) // rows
