"""`python -m bench.forgetting`: how much each method forgets at the same domain loss, with a real model and texts."""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from gci_kernels import native
from gci_kernels.files import cache_dir

from ..fetch import FetchError
from ..machine import machine, versions
from ..models import ModelError, load_model, load_tokenizer
from . import rates
from .materials import Materials, Sizes
from .methods import EAGER, METHODS
from .plot import draw
from .report import markdown, summary, trials_table
from .runs import Runs
from .training import History, Schedule

DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Comparison:
    """The settings that determine the numbers, for given code on a given machine."""

    sizes: Sizes
    schedule: Schedule
    seeds: tuple[int, ...]

    def name(self) -> str:
        """A hash of all settings, so that results of different ones never mix; runs have their rates in their names."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]


FULL = Comparison(
    Sizes(
        train=480, held_out=72, loss_tasks=30, texts=20, own=12, replayed=200, new_tokens=64, arithmetic=100,
        glosses=100, attributed=16,
    ),
    Schedule(batch=6, every=5, steps=40, target=0.55),
    seeds=(0, 1, 2),
)  # fmt: skip
QUICK = Comparison(
    Sizes(
        train=96, held_out=12, loss_tasks=12, texts=8, own=4, replayed=28, new_tokens=48, arithmetic=10, glosses=10,
        attributed=4,
    ),
    Schedule(batch=4, every=4, steps=12, target=1.35),
    seeds=(0,),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.forgetting", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, and less of everything")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS], metavar="NAME",
                        help=f"of {', '.join(METHODS)} (default: all)")  # fmt: skip
    parser.add_argument("--search", action="store_true", help="search the learning rates instead, and print them")
    parser.add_argument("--folder", type=Path, help="where runs are stored (default: in the cache folder)")
    parser.add_argument(
        "--out", type=Path, default=Path(), help="where forgetting.json, .md and .png go (default: here)"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console(stderr=True)
    comparison = QUICK if args.quick else FULL
    folder = args.folder or cache_dir() / "forgetting" / comparison.name()
    folder.mkdir(parents=True, exist_ok=True)

    def log(message: str) -> None:
        console.print(message, markup=False, highlight=False)

    log(f"runs are stored in {folder}; the same command resumes a stopped comparison")
    try:
        native.extension()  # raises where it is missing: without it the times would be those of library calls
        runs = prepare(comparison, folder, log)
        if args.search:
            print(search(runs, args.methods, log, console))
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        result = compare(runs, comparison, args.methods, log, console)
    except (FetchError, ModelError, ImportError) as error:
        log(str(error))
        return 1
    (args.out / "forgetting.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "forgetting.md").write_text(markdown(result))
    draw(result, args.out / "forgetting.png")
    print(markdown(result))
    return 0


def prepare(comparison: Comparison, folder: Path, log: Callable[[str], None]) -> Runs:
    """The runs of a comparison, with the material that they share, computed or read."""
    tokenizer = load_tokenizer("smollm2", log=log)

    def load(dtype: torch.dtype) -> nn.Module:
        return load_model("smollm2", dtype, DEVICE, log=lambda message: None)[0]

    materials = Materials(folder, tokenizer, comparison.sizes, log)
    materials.prepare(load)
    return Runs(folder / "runs", materials, load, comparison.schedule)


def search(runs: Runs, methods: list[str], log: Callable[[str], None], console: Console) -> str:
    """Searches every method's learning rate in trial runs; returns their results as a Markdown table."""
    searched = [name for name in rates.SEARCHED if name in methods]
    with _bar(console, len(searched)) as show:
        for name in searched:
            found = rates.search(runs, name, show(METHODS[name].title))
            log(f"{METHODS[name].title}: {'no rate reaches the target' if found is None else f'{found:g}'}")
    return trials_table(rates.trials(runs))


def compare(
    runs: Runs, comparison: Comparison, methods: list[str], log: Callable[[str], None], console: Console
) -> dict:
    """Does every run that has no result yet; returns all results with their summary."""
    untouched = runs.untouched()
    # Seed by seed, so that a comparison that is stopped early has results of every method.
    wanted = [(name, METHODS[name], seed) for seed in comparison.seeds for name in methods]
    if "loramoe" in methods:
        wanted += [(name, method, comparison.seeds[0]) for name, method in EAGER.items()]
    results = []
    with _bar(console, len(wanted)) as show:
        for name, method, seed in wanted:
            results.append(runs.run(name, method, seed, show(f"{method.title}, seed {seed}")))
            last = results[-1]["points"][-1]
            log(f"{method.title}, seed {seed}: domain {last['domain_loss']:.3f} after {last['step']} steps, "
                 f"general {last['general_loss']:.3f}, KL {last['kl_texts']:.3f} and {last['kl_own']:.3f}")  # fmt: skip
    return {
        "machine": machine(DEVICE),
        "versions": versions(),
        "settings": asdict(comparison),
        "untouched": untouched,
        "summary": summary(untouched, results),
        "runs": results,
        "trials": rates.trials(runs),
    }


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Callable[[str], Callable[[History], None]]]:
    """A progress bar of runs: each call begins the next run, and returns the function to call after an evaluation."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    begun = 0
    with Progress(*columns, TextColumn("{task.fields[state]}"), console=console, transient=True) as bar:
        task = bar.add_task("", total=total, state="")

        def show(description: str) -> Callable[[History], None]:
            nonlocal begun
            bar.update(task, description=description, completed=begun, state="")
            begun += 1

            def after(history: History) -> None:
                last = history.points[-1]
                bar.update(task, state=f"step {last.step}: domain {last.domain_loss:.3f}, KL {last.kl_own:.3f}")

            return after

        yield show


if __name__ == "__main__":
    sys.exit(main())
