"""`python -m bench.forgetting`: how much each method forgets at the same domain loss, with a real model and texts."""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from gci_kernels import native
from gci_kernels.files import cache_dir
from gci_kernels.progress import Bar, bar

from ..fetch import FetchError, to_stderr
from ..machine import machine, versions, write_json
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
    comparison = QUICK if args.quick else FULL
    folder = args.folder or cache_dir() / "forgetting" / comparison.name()
    folder.mkdir(parents=True, exist_ok=True)
    to_stderr(f"runs are stored in {folder}; the same command resumes a stopped comparison")
    try:
        native.extension()  # raises where it is missing: without it the times would be those of library calls
        runs = prepare(comparison, folder)
        if args.search:
            print(search(runs, args.methods))
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        result = compare(runs, comparison, args.methods)
    except (FetchError, ModelError, ImportError) as error:
        to_stderr(str(error))
        return 1
    write_json(args.out / "forgetting.json", result)
    (args.out / "forgetting.md").write_text(markdown(result))
    draw(result, args.out / "forgetting.png")
    print(markdown(result))
    return 0


def prepare(comparison: Comparison, folder: Path) -> Runs:
    """The runs of a comparison, with the material that they share, computed or read."""
    tokenizer = load_tokenizer("smollm2")

    def load(dtype: torch.dtype) -> nn.Module:
        return load_model("smollm2", dtype, DEVICE, log=lambda message: None)[0]

    materials = Materials(folder, tokenizer, comparison.sizes, to_stderr)
    materials.prepare(load)
    return Runs(folder / "runs", materials, load, comparison.schedule)


def search(runs: Runs, methods: list[str]) -> str:
    """Searches every method's learning rate in trial runs; returns their results as a Markdown table."""
    searched = [name for name in rates.SEARCHED if name in methods]
    with bar("searching rates", len(searched)) as progress:
        for name in searched:
            found = rates.search(runs, name, _begin(progress, METHODS[name].title))
            progress.print(f"{METHODS[name].title}: {'no rate reaches the target' if found is None else f'{found:g}'}")
            progress.advance()
    return trials_table(rates.trials(runs))


def compare(runs: Runs, comparison: Comparison, methods: list[str]) -> dict:
    """Does every run that has no result yet; returns all results with their summary."""
    untouched = runs.untouched()
    # Seed by seed, so that a comparison that is stopped early has results of every method.
    wanted = [(name, METHODS[name], seed) for seed in comparison.seeds for name in methods]
    if "loramoe" in methods:
        wanted += [(name, method, comparison.seeds[0]) for name, method in EAGER.items()]
    results = []
    with bar("comparing", len(wanted)) as progress:
        for name, method, seed in wanted:
            title = f"{method.title}, seed {seed}"
            results.append(runs.run(name, method, seed, _begin(progress, title)))
            last = results[-1]["points"][-1]
            progress.print(
                f"{title}: domain {last['domain_loss']:.3f} after {last['step']} steps, "
                f"general {last['general_loss']:.3f}, KL {last['kl_texts']:.3f} and {last['kl_own']:.3f}"
            )
            progress.advance()
    return {
        "machine": machine(DEVICE),
        "versions": versions(),
        "settings": asdict(comparison),
        "untouched": untouched,
        "summary": summary(untouched, results),
        "runs": results,
        "trials": rates.trials(runs),
    }


def _begin(progress: Bar, title: str) -> Callable[[History], None]:
    """Shows a run that begins; returns what shows each evaluation of it."""
    progress.step(title)

    def after(history: History) -> None:
        last = history.points[-1]
        progress.step(title, f"step {last.step}, domain {last.domain_loss:.3f}, KL {last.kl_own:.3f}")

    return after


if __name__ == "__main__":
    sys.exit(main())
