"""`gci-kernels attribute` and `gci-kernels select`: from a model and a text file to positions."""

import argparse
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from gci_kernels.bench.settings import positive
from gci_kernels.cli.options import add_model, load_model, reports
from gci_kernels.files import check_output
from gci_kernels.loki.attribution import PATHS
from gci_kernels.loki.files import attribute_file
from gci_kernels.loki.plot import draw_positions
from gci_kernels.loki.scores import HDF5_SUFFIXES, h5py_module, load_scores
from gci_kernels.loki.selection import STRATEGIES, select, write_positions


def add_attribute_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gci-kernels attribute`."""
    add_model(parser)
    parser.add_argument(
        "--text",
        type=Path,
        required=True,
        metavar="FILE",
        help=".jsonl: an object a line, with text or (for the chat template) messages; else: a sample a line",
    )
    parser.add_argument("--out", type=Path, required=True, help="FILE.safetensors, or FILE.h5 in the published layout")
    parser.add_argument("--path", choices=PATHS, default=PATHS[0], help="default: %(default)s, the faster one")
    parser.add_argument("--steps", type=positive, default=7, help="points on the path (default: %(default)s)")
    parser.add_argument("--max-tokens", type=positive, default=512, help="a sample's first tokens (default: 512)")
    parser.add_argument("--limit", type=positive, help="take the file's first samples only")
    parser.add_argument("--batch", type=positive, help="samples at a time (default: as many as are scored together)")


def add_select_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gci-kernels select`."""
    parser.add_argument("scores", type=Path, help="what attribute has written, or a published HDF5 file")
    parser.add_argument("--quota", type=float, required=True, help="percent of the rows to train")
    parser.add_argument("--strategy", choices=STRATEGIES, default=STRATEGIES[0], help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="the positions")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the chosen rows by layer")


@reports(ValueError, FloatingPointError, OSError)
def attribute(args: argparse.Namespace) -> None:
    """Score a model's knowledge vectors on a text file. The same command resumes a killed run."""
    check_output(args.out)
    if args.out.suffix in HDF5_SUFFIXES:
        h5py_module()  # raises, before the work, where it is missing
    texts = read_texts(args.text, args.limit)
    model, tokenizer = load_model(args)
    samples = [_tokens(tokenizer, text)[: args.max_tokens] for text in texts]
    attribute_file(model, samples, args.out, path=args.path, steps=args.steps, batch=args.batch)
    print(f"{args.out}: scores of {len(samples)} samples")


@reports(ValueError, OSError)
def choose(args: argparse.Namespace) -> None:
    """Scores -> positions JSON."""
    for path in filter(None, (args.out, args.plot)):
        check_output(path)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'gci_kernels[bench]'")
    scores = load_scores(args.scores)
    positions = select(scores, args.quota, args.strategy)
    write_positions(positions, args.out)
    if args.plot:
        title = f"{args.strategy.replace('_', ' ')}, {args.quota:g} percent of {len(scores)} samples' scores"
        draw_positions(positions, scores.shape[2], args.plot, title)
    chosen, rows = sum(map(len, positions)), scores.shape[1] * scores.shape[2]
    print(f"{args.out}: {chosen} of {rows} rows in {len(positions)} layers, from {len(scores)} samples")


def read_texts(path: str | os.PathLike, limit: int | None = None) -> list[str | list[dict]]:
    """The samples of a text file: strings, or chats as lists of messages. Empty lines are left out.

    Raises:
        ValueError: a line of a .jsonl file is neither a string, nor an object with `text` or `messages`; no sample.
    """
    path = Path(path)
    texts: list[str | list] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip() and (limit is None or len(texts) < limit):
            texts.append(_sample(line, f"{path}:{number}") if path.suffix == ".jsonl" else line)
    if not texts:
        raise ValueError(f"{path} holds no text")
    return texts


def _sample(line: str, where: str) -> str | list[dict]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    found = value.get("text", value.get("messages")) if isinstance(value, dict) else value
    if not found or not isinstance(found, str | list):
        raise ValueError(f"{where}: must be a string or an object with `text` or `messages`")
    return found


def _tokens(tokenizer: Any, text: str | list[dict]) -> list[int]:
    if isinstance(text, str):
        return tokenizer(text)["input_ids"]
    return tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=True)["input_ids"]
