"""`gci-kernels convert`."""

import argparse
from pathlib import Path

from gci_kernels.cli.options import fail
from gci_kernels.convert.conversions import TO, convert, recognise
from gci_kernels.convert.files import ConvertError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gci-kernels convert`."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the folder to read")
    parser.add_argument("target", type=Path, metavar="TARGET", help="the folder to make: not there yet, or empty")
    parser.add_argument(
        "--to", choices=TO, help="the format (default: the other one); plain: a published LoKI model put together"
    )
    parser.add_argument(
        "--base", type=Path, metavar="PATH", help="LoKI: the base model's folder, to split or to compare with"
    )
    parser.add_argument(
        "--positions", type=Path, metavar="FILE", help="published LoKI: its positions JSON, where the model has none"
    )


def main(args: argparse.Namespace) -> int:
    """Convert a checkpoint; exit status 1 and one line on stderr where that is not possible."""
    try:
        print(f"{args.source}: {recognise(args.source).description}")
        done = convert(args.source, args.target, to=args.to, base=args.base, positions=args.positions)
        print(f"{args.target}: {recognise(args.target).description}, {done.modules} modules")
    except (ConvertError, OSError) as error:
        return fail(error)
    for note in done.notes:
        print(f"note: {note}")
    return 0
