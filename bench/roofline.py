"""The least that a training step must move and compute, its time on a named chip, and what a plan moves.

python -m bench.roofline [--chip h200] [--tokens 8192] [--features 4096 4096] [--plan triton|aten]
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from gci_kernels.hardware import Shape
from gci_kernels.hardware.chips import CHIPS, Chip

from .costs import Cost, bottleneck_floor, frozen_floor, total_seconds
from .traffic import PLANS, count, count_decoder_layer, llama_8b


def table(shape: Shape, dtype: torch.dtype, adapter_dtype: torch.dtype, chip: Chip, plan: str) -> Table:
    """Bytes, operations and times of the frozen layer, of the floor and of `plan`, a key of PLANS."""
    title = (
        f"{shape.tokens} tokens, {shape.depth} to {shape.width}, rank {shape.rank}"
        + (f" in {shape.experts} experts" if shape.experts else "")
        + f", {str(dtype).removeprefix('torch.')}, on {chip.name.upper()}"
    )
    result = Table(title=title, title_justify="left")
    for column in ("", "MB", "GFLOP", "floor, us"):
        result.add_column(column, justify="left" if not column else "right")
    frozen, least = frozen_floor(shape, dtype), bottleneck_floor(shape, dtype, adapter_dtype)
    moved, _ = count(shape, dtype, adapter_dtype, chip, plan=PLANS[plan])
    for heading, costs in (("frozen layer", frozen), ("floor", least), ("plan", moved)):
        result.add_section()
        for cost in costs:
            result.add_row(cost.name, *_cells([cost], chip, dtype))
        result.add_row(f"[bold]{heading}", *_cells(costs, chip, dtype))
    ratio = sum(cost.moved for cost in moved) / sum(cost.moved for cost in least)
    tax = total_seconds(least, chip, dtype) / total_seconds(frozen, chip, dtype)
    result.caption = f"The plan moves {ratio:.3f} of the floor's bytes; the floor's adapter tax is {tax:.3f}."
    return result


def decoder_table(tokens: int, rank: int, experts: int, dtype: torch.dtype, chip: Chip, plan: str) -> Table:
    """What the adapters of a decoder layer of Llama-3.1-8B move, each by itself and with one x shared by several."""
    named = f"rank {rank}" + (f" in {experts} experts" if experts else "")
    title = f"adapters of a decoder layer of Llama-3.1-8B, {tokens} tokens, {named}, on {chip.name.upper()}; MB"
    result = Table(title=title, title_justify="left")
    for column in ("", "apart", "sharing x"):
        result.add_column(column, justify="left" if not column else "right")
    groups, how = llama_8b(tokens, rank, experts), dict(plan=PLANS[plan])
    apart, sharing = (
        count_decoder_layer(groups, dtype, dtype, chip, shared=shared, **how) for shared in (False, True)
    )  # fmt: skip
    words = {"activations": "reading of x and dY", "narrow": "all that is narrow", "sums": "adding up dX"}
    for name, text in words.items():
        result.add_row(text, f"{apart[name] / 1e6:.0f}", f"{sharing[name] / 1e6:.0f}")
    return result


def _cells(costs: list[Cost], chip: Chip, dtype: torch.dtype) -> list[str]:
    moved, operations = sum(cost.moved for cost in costs), sum(cost.operations for cost in costs)
    return [f"{moved / 1e6:.1f}", f"{operations / 1e9:.1f}", f"{total_seconds(costs, chip, dtype) * 1e6:.1f}"]


def main(argv: list[str] | None = None) -> None:
    """Print the tables of a LoRA and of a LoRAMoE layer, and of a decoder layer with each."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", choices=CHIPS, default="h200")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--features", type=int, nargs=2, default=(4096, 4096), metavar=("IN", "OUT"))
    parser.add_argument("--plan", choices=("triton", "aten"), default="triton")
    args = parser.parse_args(argv)
    console = Console(width=None if Console().is_terminal else 120)
    for rank, experts in ((16, 0), (32, 8)):
        shape = Shape(args.tokens, *args.features, rank, experts, experts)
        console.print(table(shape, torch.bfloat16, torch.bfloat16, CHIPS[args.chip], args.plan))
        console.print(decoder_table(args.tokens, rank, experts, torch.bfloat16, CHIPS[args.chip], args.plan))


if __name__ == "__main__":
    main()
