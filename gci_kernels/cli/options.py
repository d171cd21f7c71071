"""What several commands share: options that name a model, and how an error ends a command."""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from gci_kernels.bench.settings import device_of

DTYPES = ("float32", "bfloat16", "float64")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --device and --dtype, which :func:`load_model` reads."""
    parser.add_argument("--model", default="smollm2", help="smollm2 (default), a local folder, or a hub id")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="the model's (default: %(default)s)")


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer.

    Raises:
        ValueError: it cannot be loaded (ModelError), or has no tokenizer.
    """
    from gci_kernels.bench import models

    model, tokenizer = models.load_model(args.model, getattr(torch, args.dtype), torch.device(device_of(args)))
    if tokenizer is None:
        raise ValueError(f"--model {args.model} has no tokenizer, so it cannot read text")
    return model, tokenizer


def reports(*errors: type[Exception]) -> Callable[[Callable[[argparse.Namespace], None]], Callable[..., int]]:
    """Decorates a command: it returns the exit status, and one of `errors` is printed in one line on stderr."""

    def decorate(run: Callable[[argparse.Namespace], None]) -> Callable[..., int]:
        @functools.wraps(run)
        def command(args: argparse.Namespace) -> int:
            try:
                run(args)
            except errors as error:
                print(" ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
                return 1
            return 0

        return command

    return decorate
