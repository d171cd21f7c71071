"""`python -m bench.attribution`: LoKI's attribution against the published procedure, on the same sample."""

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gci_kernels.accuracy import relative_error
from gci_kernels.loki import attribute
from gci_kernels.loki.attribution import PATHS

from .correctness import CorrectnessError
from .loki_baseline import published_attribution
from .machine import environment, write_json
from .models import load_model
from .timing import interleave
from .variants import random_ids

TEXT = (
    "A language model that is tuned for one field tends to lose some of what it knew about all others. Its knowledge "
    "lies in the rows of the last projection of every layer: each row is a vector that the layer can write into what "
    "it passes on. Which of them matter for a given answer can be measured. One moves what a layer writes from nothing "
    "to what it is, a step at a time, and asks at each step how much the probability of the answer would change. Rows "
    "that hardly any answer depends on can be given to the new field, while the others stay as they are, and what the "
    "model knew before is kept. "
)


def compare(model: nn.Module, ids: Tensor, path: str, *, steps: int = 7, rounds: int = 1) -> dict:
    """Times of both on one sample [1, tokens] int64, on the model's device, after comparing their scores.

    Raises:
        CorrectnessError: their scores differ by more than half the digits of the model's dtype.
    """
    fns = {
        "published": lambda: published_attribution(model, ids, path=path, steps=steps),
        "gci": lambda: attribute(model, ids, path=path, steps=steps)[0],
    }
    error = relative_error(fns["gci"](), fns["published"]())
    allowed = math.sqrt(torch.finfo(model.dtype).eps)
    if error > allowed:
        raise CorrectnessError(f"{path}: the scores differ by {error:.1e}, {allowed:.1e} is allowed")
    seconds = interleave(fns, device=ids.device, rounds=rounds, warmup=0)
    speedup = seconds["published"] / seconds["gci"]
    return {
        "path": path,
        "tokens": ids.shape[1],
        "error": error,
        "seconds": {name: asdict(timing) for name, timing in seconds.items()},
        "speedup": asdict(speedup),
    }


def sample(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, tokens: int) -> Tensor:
    """[1, tokens] int64 on the model's device: a text, repeated; random ids where there is no tokenizer."""
    if tokenizer is None:
        return random_ids(model, 1, tokens)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    return ids.repeat(-(-tokens // len(ids)))[None, :tokens].to(model.device)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.attribution", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2 (default), random-llama[:SIZE], a folder, a hub id")
    parser.add_argument("--path", choices=PATHS, nargs="+", default=PATHS)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, every sample included")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    model, tokenizer = load_model(args.model, torch.float32, device)
    model.eval().requires_grad_(False)
    ids = sample(model, tokenizer, args.tokens)
    result = {**environment(device), "model": args.model}
    try:
        result["paths"] = [compare(model, ids, path, rounds=args.rounds) for path in args.path]
    except CorrectnessError as error:
        print(f"No times are shown: {error}", file=sys.stderr)
        return 1
    _print(result)
    if args.json:
        write_json(args.json, result)
    return 0


def _print(result: dict) -> None:
    title = f"{result['model']}, one sample of {result['paths'][0]['tokens']} tokens, seconds"
    table = Table("path", "published", "gci_kernels", "times as fast", "scores differ by", title=title)
    for path in result["paths"]:
        published, gci = (path["seconds"][name]["median"] for name in ("published", "gci"))
        speedup = f"{path['speedup']['median']:.1f}"
        table.add_row(path["path"], f"{published:.2f}", f"{gci:.2f}", speedup, f"{path['error']:.1e}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
