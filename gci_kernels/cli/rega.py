"""`gci-kernels rega distill` and `gci-kernels rega mix`: from instructions and domains' pairs to training data."""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gci_kernels.cli.options import add_model, load_model, reports
from gci_kernels.files import check_output
from gci_kernels.rega.distill import distill
from gci_kernels.rega.distilled import read_distilled, read_records
from gci_kernels.rega.instructions import Pair, Problem, is_distilled, read_instructions, read_pairs
from gci_kernels.rega.mixture import Mixture, mixture, write_mixture
from gci_kernels.rega.prompts import GENERAL, Roles


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two commands of `gci-kernels rega`, and their options."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_distill(commands.add_parser("distill", help="the untouched model's answers to general instructions"))
    _add_mix(commands.add_parser("mix", help="general pairs and domains' pairs under their prompts, as JSON lines"))


def _add_distill(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--instructions", type=Path, required=True, metavar="FILE",
        help=".jsonl: an object a line, with instruction, prompt or messages; else: an instruction a line",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.jsonl", help="the answers; an unfinished file is resumed"
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--roles", type=Path, metavar="FILE.json", help="answer under its central prompt")
    prompt.add_argument("--prompt", metavar="TEXT", help="answer under this prompt (default: under the template's own)")
    parser.add_argument("--temperature", type=float, default=0.7, help="default: %(default)s; 0: greedy")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="instructions at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--limit", type=int, help="take the file's first instructions only")
    parser.set_defaults(run=run_distill)


def _add_mix(parser: argparse.ArgumentParser) -> None:
    pairs = ".jsonl, an object a line: instruction or prompt with answer, completion or response; or messages"
    parser.add_argument("--general", type=Path, required=True, metavar="FILE", help=f"what distill wrote, or {pairs}")
    parser.add_argument(
        "--domain", type=_named, required=True, action="append", metavar="NAME=FILE", help=f"a domain's pairs: {pairs}"
    )
    parser.add_argument("--roles", type=Path, required=True, metavar="FILE.json", help="central, and domains by name")
    parser.add_argument("--integration", type=float, default=0.1, help="share of each domain (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--model", help="whose chat template the prompts must fit (default: it has a system turn)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="the mixture")
    parser.set_defaults(run=run_mix)


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not name or not equals or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name, Path(path)


@reports(ValueError, OSError)
def run_distill(args: argparse.Namespace) -> None:
    """Answer a file's instructions. The same command resumes a killed run."""
    check_output(args.out)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    prompt = Roles.load(args.roles).central if args.roles else args.prompt
    instructions, problems = read_instructions(args.instructions)
    _print_problems(args.instructions, problems)
    model, tokenizer = load_model(args)
    distill(
        model, tokenizer, instructions[: args.limit], out=args.out, prompt=prompt, temperature=args.temperature,
        top_p=args.top_p, max_new_tokens=args.max_new_tokens, batch_size=args.batch, seed=args.seed,
    )  # fmt: skip
    _show_answers(args.out)


@reports(ValueError, OSError)
def run_mix(args: argparse.Namespace) -> None:
    """Mix pairs under the roles' prompts into training data."""
    from gci_kernels.bench.models import load_tokenizer

    check_output(args.out)
    roles = Roles.load(args.roles)
    names = [name for name, _ in args.domain]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--domain {repeated[0]} is given twice")
    general = read_distilled(args.general) if is_distilled(args.general) else _pairs(args.general)
    domains = {name: _pairs(path) for name, path in args.domain}
    tokenizer = None
    if args.model and (tokenizer := load_tokenizer(args.model)) is None:
        raise ValueError(f"--model {args.model} has no tokenizer, and so no chat template")
    result = mixture(general, domains, roles, integration=args.integration, seed=args.seed, tokenizer=tokenizer)
    write_mixture(result, args.out)
    _show_mixture(result, args.out)


def _pairs(path: Path) -> list[Pair]:
    pairs, problems = read_pairs(path)
    _print_problems(path, problems)
    return pairs


def _print_problems(path: Path, problems: list[Problem]) -> None:
    for problem in problems:
        print(f"{path}:{problem.line}: {problem.message}", file=sys.stderr)


def _show_answers(path: Path) -> None:
    records = read_records(path)
    table = Table("answers", "", title=str(path))
    for name, dropped in (("kept", None), ("dropped: empty", "empty"), ("dropped: repeated", "repeated")):
        table.add_row(name, str(sum(record["dropped"] == dropped for record in records)))
    cut = sum(record["dropped"] is None and not record["finished"] for record in records)
    table.add_row("kept, but cut off at --max-new-tokens", str(cut))
    Console().print(table)


def _show_mixture(result: Mixture, path: Path) -> None:
    counts = result.counts
    table = Table("examples", "own prompt", "central prompt", title=str(path))
    table.add_row(GENERAL, "", str(counts.general))
    for name, count in counts.domains.items():
        table.add_row(name, str(count), str(counts.integrated[name]))
    central = counts.general + sum(counts.integrated.values())
    table.add_row("all", str(counts.total - central), str(central))
    Console().print(table)
