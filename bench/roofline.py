"""Bytes and operations of a training step's stages: the floor, and what the plan moves; and their time on a named chip.

    python -m bench.roofline [--chip h200] [--tokens 8192] [--features 4096 4096] [--plan triton|aten]

The floor of a stage reads every operand once and writes every result once. What a plan moves is counted from the plan
itself: the op runs on torch's "meta" device, and every kernel it launches and every torch operation it calls is an
entry. The big product's tiles are walked through a cache of the chip's size; what is small enough to stay there, the
adapter's own tensors, counts once.
"""

import argparse
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .launches import TRITON, Call, Case, record, training_step

ATEN = "/".join(["aten"] * 5)


@dataclass(frozen=True)
class Chip:
    """Peak rates as the maker gives them: dense matrix products, no sparsity."""

    capability: str
    processors: int
    bandwidth: float  # bytes a second
    cache: float  # bytes, last level
    half: float  # bfloat16 and float16 operations a second
    single: float  # float32 operations a second, without TF32

    def seconds(self, moved: float, operations: float, dtype: torch.dtype) -> float:
        """The least time for so many bytes and operations, each overlapping the other."""
        return max(moved / self.bandwidth, operations / (self.single if dtype == torch.float32 else self.half))


CHIPS = {
    "a100": Chip("sm_80", 108, 2.04e12, 40e6, 312e12, 19.5e12),
    "h100": Chip("sm_90", 132, 3.35e12, 50e6, 989e12, 67e12),
    "h200": Chip("sm_90", 132, 4.8e12, 50e6, 989e12, 67e12),
    "b200": Chip("sm_100", 148, 8.0e12, 126e6, 2250e12, 75e12),
    "mi300x": Chip("gfx942", 304, 5.3e12, 256e6, 1307e12, 163e12),
}


def chip_of(device_name: str) -> Chip | None:
    """The chip of a GPU by the name its driver gives ("NVIDIA H200"); None for one whose rates are not listed."""
    words = device_name.lower().replace("-", " ").split()
    return next((chip for name, chip in CHIPS.items() if name in words), None)


@dataclass(frozen=True)
class Entry:
    """One stage, kernel or operation: the bytes it moves, and its operations in matrix products."""

    name: str
    moved: float
    operations: float = 0.0


def floor(case: Case, dtype: torch.dtype, adapter_dtype: torch.dtype) -> list[Entry]:
    """The stages of forward and backward of one adapted layer, every operand and every result once."""
    size, adapter = dtype.itemsize, adapter_dtype.itemsize
    columns = case.rank + case.experts
    x, y = case.tokens * case.features_in * size, case.tokens * case.features_out * size
    weight = case.features_in * case.features_out * size
    u, h, gates = case.tokens * case.rank * size, case.tokens * columns * 4, case.tokens * case.experts * 4
    A, B = columns * case.features_in * adapter, case.features_out * case.rank * adapter
    dh, du = case.tokens * columns * size, case.tokens * case.rank * 4
    dA, dB = columns * case.features_in * 4, case.features_out * case.rank * 4
    base = 2 * case.tokens * case.features_in * case.features_out
    into, out = 2 * case.tokens * case.features_in * columns, 2 * case.tokens * case.features_out * case.rank
    return [
        Entry("forward: project", x + A + h, into),
        Entry("forward: mix", h + u + gates),
        Entry("forward: expand", x + weight + u + B + y, base + out),
        Entry("backward: dU, dB", y + B + u + du + dB, 2 * out),
        Entry("backward: mix", du + h + dh + u),
        Entry("backward: dX", y + weight + dh + A + x, base + into),
        Entry("backward: dA", x + dh + dA, into),
    ]


def frozen_floor(case: Case, dtype: torch.dtype) -> list[Entry]:
    """The same of the frozen layer: y and dX."""
    elements = case.tokens * (case.features_in + case.features_out) + case.features_in * case.features_out
    operations = 2 * case.tokens * case.features_in * case.features_out
    return [Entry(name, elements * dtype.itemsize, operations) for name in ("forward", "backward: dX")]


def seconds(entries: list[Entry], chip: Chip, dtype: torch.dtype) -> float:
    """The least time for entries that run one after another."""
    return sum(chip.seconds(entry.moved, entry.operations, dtype) for entry in entries)


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
        if func.is_view or not isinstance(result, Tensor):
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


def table(case: Case, dtype: torch.dtype, adapter_dtype: torch.dtype, chip_name: str, plan: str) -> Table:
    chip = CHIPS[chip_name]
    title = (
        f"{case.tokens} tokens, {case.features_in} to {case.features_out}, rank {case.rank}"
        + (f" in {case.experts} experts" if case.experts else "")
        + f", {str(dtype).removeprefix('torch.')}, on {chip_name.upper()}"
    )
    result = Table(title=title, title_justify="left")
    for column in ("", "MB", "GFLOP", "floor, us"):
        result.add_column(column, justify="left" if not column else "right")
    frozen, least = frozen_floor(case, dtype), floor(case, dtype, adapter_dtype)
    moved, _ = count(case, dtype, adapter_dtype, chip, plan=plan)
    for heading, entries in (("frozen layer", frozen), ("floor", least), ("plan", moved)):
        result.add_section()
        for entry in entries:
            result.add_row(entry.name, *_cells([entry], chip, dtype))
        result.add_row(f"[bold]{heading}", *_cells(entries, chip, dtype))
    ratio = sum(entry.moved for entry in moved) / sum(entry.moved for entry in least)
    tax = seconds(least, chip, dtype) / seconds(frozen, chip, dtype)
    result.caption = f"The plan moves {ratio:.3f} of the floor's bytes; the floor's adapter tax is {tax:.3f}."
    return result


def _cells(entries: list[Entry], chip: Chip, dtype: torch.dtype) -> list[str]:
    moved, operations = sum(entry.moved for entry in entries), sum(entry.operations for entry in entries)
    return [f"{moved / 1e6:.1f}", f"{operations / 1e9:.1f}", f"{seconds(entries, chip, dtype) * 1e6:.1f}"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=CHIPS, default="h200")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--features", type=int, nargs=2, default=(4096, 4096), metavar=("IN", "OUT"))
    parser.add_argument("--plan", choices=("triton", "aten"), default="triton")
    args = parser.parse_args(argv)
    console = Console(width=None if Console().is_terminal else 120)
    for rank, experts in ((16, 0), (32, 8)):
        case = Case(args.tokens, *args.features, rank, experts)
        plan = TRITON if args.plan == "triton" else ATEN
        console.print(table(case, torch.bfloat16, torch.bfloat16, args.chip, plan))


if __name__ == "__main__":
    main()
