"""What a plan moves, in bytes, counted from the plan itself.

The op runs on torch's "meta" device, and every kernel it launches and every torch operation it calls has a cost.
Which tiles of the base product are read again is simulated with a cache of the chip's size. The adapter's own tensors
are small enough to stay in that cache, and count once.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gci_kernels.hardware import Shape
from gci_kernels.hardware.chips import Chip
from gci_kernels.ops.bottleneck.checks import ATEN, TRITON
from gci_kernels.ops.bottleneck.plan import Plan

from .costs import Cost
from .launches import Call, record, training_step

PLANS = {"triton": TRITON, "aten": ATEN}


def count(
    shape: Shape, dtype: torch.dtype, adapter_dtype: torch.dtype, chip: Chip, *, plan: Plan = TRITON,
    dropout_p: float = 0.0,
) -> tuple[list[Cost], list[int]]:  # fmt: skip
    """What forward and backward under `plan` move on `chip`, in order; and the bytes of each tensor they allocate."""
    costs: list[Cost] = []
    allocated: list[int] = []
    directions = training_step(shape, dtype, adapter_dtype, plan=plan, dropout_p=dropout_p)
    for name, direction in zip(("forward", "backward"), directions, strict=True):
        operations = _Operations(name)

        def step(direction: Callable[[], None] = direction, operations: _Operations = operations) -> None:
            with operations:
                direction()

        calls = record(step, chip.capability)
        costs += [_cost(f"{name}: {call.launch.name}", call, chip) for call in calls]
        costs += operations.costs
        allocated += operations.allocated
    return costs, allocated


class _Operations(TorchDispatchMode):
    """Every torch operation that computes, with the bytes of its operands and results; and what is allocated."""

    def __init__(self, direction: str) -> None:
        super().__init__()
        self.direction = direction
        self.costs: list[Cost] = []
        self.allocated: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # The second is a view as well, although its schema does not say so.
        if func.is_view or func is torch.ops.aten._unsafe_view.default or not isinstance(result, Tensor):
            return result
        inputs = [arg for arg in pytree.tree_leaves((args, kwargs or {})) if isinstance(arg, Tensor)]
        in_place = any(result is arg for arg in inputs)
        if not in_place:
            self.allocated.append(result.nbytes)
        name = func._schema.name.removeprefix("aten::")
        if "empty" not in name:
            operations = 0
            if name in ("mm", "addmm", "addmm_"):
                left = inputs[-2]
                operations = 2 * left.shape[0] * left.shape[1] * result.shape[1]
            # What is added to in place is read as an input and written as the result.
            moved = sum(tensor.nbytes for tensor in inputs) + result.nbytes
            self.costs.append(Cost(f"{self.direction}: {name}", moved, operations))
        return result


def _cost(name: str, call: Call, chip: Chip) -> Cost:
    """Bytes and operations of one Triton launch; ValueError for a kernel that is not counted here."""
    kernel, given = call.launch.name, call.arguments
    tensors = {key: getattr(value, "base", value) for key, value in given.items() if key.endswith("_ptr")}
    size = {key.removesuffix("_ptr"): tensor.nbytes for key, tensor in tensors.items()}
    moved, operations = float(sum(size.values())), 0
    if kernel in ("expand_fwd", "expand_persistent"):
        moved = _product_reads(call, size, chip) + size["u"] + size["m"] + size["y"]
        moved += size["bias"] if given["HAS_BIAS"] else 0
        moved += size["bits"] if given.get("DROPOUT") else 0
        operations = 2 * given["tokens"] * given["width"] * (given["depth"] + given["rank"])
    elif kernel in ("project_fwd", "reduce_fwd"):
        wide, narrow, columns = ("x", "m", "width") if kernel == "project_fwd" else ("y", "u", "rank")
        readings = call.grid[1]  # each tile of the narrow side's columns reads the wide operand
        moved = readings * size[wide] + size[narrow] + size["out"]
        operations = 2 * tensors[f"{wide}_ptr"].numel() * given[columns]
        moved += size["bits"] if given["DROPOUT"] else 0
    elif kernel == "project_reduce_fwd":
        operations = 4 * given["tokens"] * given["width"] * given["rank"]
    elif kernel == "gate_bwd":
        moved -= 0 if given["HAS_DGATES"] else size["dgates"]
    elif kernel not in ("gate_fwd", "sum_splits", "dropout_fwd", "dropout_bits"):
        raise ValueError(f"{kernel} has no count of its bytes in bench/traffic.py")
    return Cost(name, moved, operations)


def _product_reads(call: Call, size: dict[str, int], chip: Chip) -> float:
    """Bytes of x and w that the base product reads from memory: its tiles in launch order, with an LRU cache.

    As many programs as the chip has processors run at a time and step through the depth together. Each reads its rows
    of x and its columns of w a slice at a time, and a slice is read from memory unless it is in the cache.
    """
    given = call.arguments
    if not given.get("HAS_BASE", True):  # the persistent kernel always has one
        return 0
    tiles_t, tiles_n = -(-given["tokens"] // given["BLOCK_T"]), -(-given["width"] // given["BLOCK_N"])
    slices = 16
    slice_x, slice_w = size["x"] / tiles_t / slices, size["w"] / tiles_n / slices
    cache: OrderedDict[tuple[str, int, int], float] = OrderedDict()
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
    """Row and column of a program's tile, in the order of ops/bottleneck/triton/tiles.py."""
    first = pid // (group * tiles_n) * group
    rows = min(tiles_t - first, group)
    return first + pid % (group * tiles_n) % rows, pid % (group * tiles_n) // rows
