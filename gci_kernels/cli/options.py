"""What several commands share: options that name a model, and how an error ends a command."""

import argparse
import sys
from typing import Any

import torch

DTYPES = ("float32", "bfloat16", "float64")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --device and --dtype, which :func:`load_model` reads."""
    parser.add_argument("--model", default="smollm2", help="smollm2 (default), a local folder, or a hub id")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="the model's (default: %(default)s)")


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer.

    Raises:
        ValueError: it cannot be loaded, or has no tokenizer.
    """
    from gci_kernels.bench import models

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        model, tokenizer = models.load_model(args.model, getattr(torch, args.dtype), device)
    except models.ModelError as error:
        raise ValueError(str(error)) from error
    if tokenizer is None:
        raise ValueError(f"--model {args.model} has no tokenizer, so it cannot read text")
    return model, tokenizer


def fail(error: Exception) -> int:
    """Prints the error in one line on stderr; returns the exit status 1."""
    print(" ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
    return 1
