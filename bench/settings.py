"""The options of `gci-kernels bench`."""

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from gci_kernels.files import check_output

from .cases import all_methods
from .models import RANDOM_LLAMAS
from .products import CANDIDATES

SIZES = ("rounds", "batch", "seq", "new_tokens")
DTYPES = ["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Settings:
    """The options, with their defaults filled in. Sizes that are not in `fixed` are reduced where time is short."""

    model: str
    method: str
    dtypes: tuple[str, ...]
    device: str
    batch: int
    seq: int
    new_tokens: int
    many: int  # sequences generated together, measured beside a single one; 0: not measured
    rounds: int
    adapter_dtype: str
    quick: bool
    layers: bool
    models: bool
    fixed: tuple[str, ...]  # those of dtype, rounds, batch, seq and new_tokens that the user has given

    def adapter(self, dtype: torch.dtype) -> torch.dtype:
        """The adapters' dtype in a model of `dtype`."""
        return torch.float32 if self.adapter_dtype == "float32" else dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gci-kernels bench`."""
    sizes = "|".join(RANDOM_LLAMAS)
    parser.add_argument(
        "--model", default="smollm2", help=f"smollm2 (default), random-llama[:{sizes}], a local folder, or a hub id"
    )
    parser.add_argument("--method", choices=all_methods(), default="loramoe")
    parser.add_argument(
        "--dtype", choices=DTYPES, nargs="+",
        help=f"default: of {' and '.join(CANDIDATES)} what this CPU multiplies fast; on CUDA all three",
    )  # fmt: skip
    parser.add_argument(
        "--adapter-dtype", choices=["model", "float32"], default="model",
        help="model (default): adapters in the model's dtype; float32: PEFT's default, slower in eager PyTorch",
    )  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    size = "sizes that are not given are reduced where the run would not end in time"
    parser.add_argument("--batch", type=positive, help=f"sequences in a train step (default: 2; {size})")
    parser.add_argument("--seq", type=positive, help="tokens in a sequence (default: 256; --quick: 128)")
    parser.add_argument("--new-tokens", type=positive, help="tokens to generate (default: 32; --quick: 16)")
    parser.add_argument("--rounds", type=positive, help="how often each variant is timed (default: 10; --quick: 3)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's own choice)")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--layers-only", action="store_true", help="time single layers, no model")
    part.add_argument("--model-only", action="store_true", help="time the model, no single layers")
    parser.add_argument("--quick", action="store_true", help="at most two minutes; without it, at most fifteen")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, every sample included")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the model's numbers")


def positive(text: str) -> int:
    """The value of an option that must be a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def device_of(args: argparse.Namespace) -> str:
    """The device that is given, else CUDA where there is one, else the CPU."""
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def settings_of(args: argparse.Namespace, dtypes: tuple[str, ...]) -> Settings:
    """The settings from parsed arguments, and the dtypes to measure."""
    return Settings(
        model=args.model,
        method=args.method,
        dtypes=dtypes,
        device=device_of(args),
        batch=args.batch or 2,
        seq=args.seq or (128 if args.quick else 256),
        new_tokens=args.new_tokens or (16 if args.quick else 32),
        many=0 if args.quick else 8,
        rounds=args.rounds or (3 if args.quick else 10),
        adapter_dtype=args.adapter_dtype,
        quick=args.quick,
        layers=not args.model_only,
        models=not args.layers_only,
        fixed=tuple(name for name in ("dtype", *SIZES) if getattr(args, name) is not None),
    )


def check_outputs(args: argparse.Namespace) -> None:
    """Ends the program before minutes of measuring where the results can't be written."""
    for path in (args.json, args.plot):
        try:
            if path:
                check_output(path)
        except ValueError as error:
            raise SystemExit(str(error)) from error
    if args.plot and args.layers_only:
        raise SystemExit("--plot draws the model's numbers: leave out --layers-only")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install 'gci_kernels[bench]'")
