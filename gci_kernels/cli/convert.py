"""`gci-kernels convert`."""

import argparse
from pathlib import Path

from gci_kernels.cli.options import reports
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


@reports(ConvertError, OSError)
def main(args: argparse.Namespace) -> None:
    """Convert a checkpoint."""
    print(f"{args.source}: {recognise(args.source).description}")
    done = convert(args.source, args.target, to=args.to, base=args.base, positions=args.positions)
    print(f"{args.target}: {recognise(args.target).description}, {done.modules} modules")
    for note in done.notes:
        print(f"note: {note}")
