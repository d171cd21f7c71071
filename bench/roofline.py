"""Bytes and operations of a training step's stages, the least there can be, and their time on a named chip.

    python -m bench.roofline [--chip h200] [--tokens 8192] [--features 4096 4096] [--plan triton|aten]

The floor of a stage reads every operand once and writes every result once. What a plan moves is counted by traffic.py.
"""

import argparse
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table


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
class Case:
    """One adapted layer in training: x [tokens, features_in], `rank` columns of B, `experts` of them (0: LoRA)."""

    tokens: int
    features_in: int
    features_out: int
    rank: int
    experts: int
    dropout_p: float = 0.0


@dataclass(frozen=True)
class Rows:
    """One layer in training of whose features_out rows `trained` are trained (LoKI)."""

    tokens: int
    features_in: int
    features_out: int
    trained: int


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


def rows_floor(case: Rows, dtype: torch.dtype, adapter_dtype: torch.dtype) -> list[Entry]:
    """The same of a layer with trained rows: the frozen layer's two products, and dY's trained columns times x."""
    forward, dx = frozen_floor(case, dtype)
    # Each of the two products reads the trained rows where they are, in their own dtype, in place of as many of W's.
    instead = case.trained * case.features_in * (adapter_dtype.itemsize - dtype.itemsize)
    x, columns = case.tokens * case.features_in * dtype.itemsize, case.tokens * case.trained * dtype.itemsize
    dactive = case.trained * case.features_in * adapter_dtype.itemsize
    return [
        Entry(forward.name, forward.moved + instead, forward.operations),
        Entry(dx.name, dx.moved + instead, dx.operations),
        Entry("backward: dactive", columns + x + dactive, 2 * case.tokens * case.features_in * case.trained),
    ]


def frozen_floor(case: Case | Rows, dtype: torch.dtype) -> list[Entry]:
    """The same of the frozen layer: y and dX."""
    elements = case.tokens * (case.features_in + case.features_out) + case.features_in * case.features_out
    operations = 2 * case.tokens * case.features_in * case.features_out
    return [Entry(name, elements * dtype.itemsize, operations) for name in ("forward", "backward: dX")]


def seconds(entries: list[Entry], chip: Chip, dtype: torch.dtype) -> float:
    """The least time for entries that run one after another."""
    return sum(chip.seconds(entry.moved, entry.operations, dtype) for entry in entries)


def floor_seconds(
    case: Case | Rows, dtype: torch.dtype, adapter_dtype: torch.dtype, device: torch.device
) -> dict[str, float] | None:
    """The least time of forward and backward: "frozen" and "gci"; None where the device's rates are not listed."""
    chip = chip_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if chip is None:
        return None
    adapted = rows_floor if isinstance(case, Rows) else floor
    least = {"frozen": frozen_floor(case, dtype), "gci": adapted(case, dtype, adapter_dtype)}
    return {name: seconds(entries, chip, dtype) for name, entries in least.items()}


def table(case: Case, dtype: torch.dtype, adapter_dtype: torch.dtype, chip_name: str, plan: str) -> Table:
    from .traffic import PLANS, count  # needs triton, which the floor does not

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
    moved, _ = count(case, dtype, adapter_dtype, chip, plan=PLANS[plan])
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
        console.print(table(case, torch.bfloat16, torch.bfloat16, args.chip, args.plan))


if __name__ == "__main__":
    main()
