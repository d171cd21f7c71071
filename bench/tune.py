"""`gci-kernels tune`: faster launch configurations of the Triton kernels for given shapes, found by trying, and kept.

Each launch of a training step is tried with one field of its configuration changed at a time, the best value kept
before the next field. A configuration that does not compile, or gives wrong results, is left out.
hardware/tuned.py keeps the best one and returns it from then on.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.files import make_cache_dir
from gci_kernels.hardware import KERNELS, LaunchConfig, Shape, kernels, records, tuned
from gci_kernels.hardware.stages import Results, Stage
from gci_kernels.impl import triton_obstacle
from gci_kernels.progress import bar
from gci_kernels.proof.verify import widened

from .cases import METHODS, layer_shape
from .timing import interleave

#: A configuration has to take at most this share of the time of the one before; less of a gain is noise.
WORTHWHILE = 0.98


@dataclass(frozen=True)
class Target:
    """One launch to tune.

    Attributes:
        launch: the registered launch, and `arguments` those of its `choose`.
        run: computes a stage that makes the launch.
        truth, bounds: the stage's results in float64, and the error allowed for each.
    """

    launch: LaunchConfig
    arguments: tuple[object, ...]
    run: Callable[[], Results]
    truth: Results
    bounds: tuple[float, ...]


def targets(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Target]:
    """The launches that have candidates, in the stages of a layer of `shape` with adapters in `dtype`."""
    for kernel in KERNELS.values():
        if not any(launch.candidates for launch in kernel.launches):
            continue
        for stage in kernel.stages(shape, dtype, device).values():
            yield from _targets_of(stage, dtype)


def _targets_of(stage: Stage, dtype: torch.dtype) -> Iterator[Target]:
    run, library = partial(stage.implementations["triton"], stage.operands, dtype), stage.implementations["aten"]
    truth, plain = library(widened(stage.operands), torch.float64), library(stage.operands, dtype)
    bounds = tuple(error_bound(relative_error(p, t), dtype) for p, t in zip(plain, truth, strict=True))
    with tuned.requests() as requests:
        run()
    for name, arguments in dict.fromkeys(requests):
        launch = kernels.get_launch(name)[1]
        if launch.candidates and launch.choose(*arguments) is not None:
            yield Target(launch, arguments, run, truth, bounds)


@dataclass(frozen=True)
class Found:
    """The result of tuning one launch: seconds before and after, and how many configurations were left out, by why."""

    launch: LaunchConfig
    arguments: tuple[object, ...]
    before: float
    after: float
    best: object
    tried: int
    left_out: dict[str, int]


def tune(
    target: Target, device: torch.device, seconds: Callable[[Callable[[], object]], float],
    advance: Callable[[], None] = lambda: None,
) -> Found:  # fmt: skip
    """Try the candidates of the target's launch in turn, and keep the best configuration where it is worth it.

    Args:
        seconds: measures a call.
        advance: called once a candidate.

    Raises:
        RuntimeError: the launch fails, or is wrong, with the configuration that is chosen without tuning.
    """
    launch, arguments = target.launch, target.arguments
    chosen = best = launch.choose(*arguments)

    def time(candidate: object) -> float | str:
        """Seconds, or why there are none."""
        with tuned.trying(launch.name, candidate):
            try:
                errors = [relative_error(a, t) for a, t in zip(target.run(), target.truth, strict=True)]
            except Exception as failure:  # a compiler's refusal comes as many types; it is counted and shown
                return type(failure).__name__
            right = all(error <= bound for error, bound in zip(errors, target.bounds, strict=True))
            return seconds(target.run) if right else "wrong"

    before = after = time(chosen)
    if isinstance(before, str) or isinstance(after, str):
        raise RuntimeError(f"{launch.name} {arguments} fails with the configuration chosen for it, {chosen}: {before}")
    tried, left_out = 0, dict[str, int]()
    for field, value in ((field, value) for field, values in launch.candidates.items() for value in values):
        candidate = dataclasses.replace(best, **{field: value})
        advance()
        if candidate == best:
            continue
        result, tried = time(candidate), tried + 1
        if isinstance(result, str):
            left_out[result] = left_out.get(result, 0) + 1
        elif result < after * WORTHWHILE:
            best, after = candidate, result
    if best != chosen:
        tuned.keep(launch.name, arguments, best, device)
    return Found(launch, arguments, before, after, best, tried, left_out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gci-kernels tune`."""
    parser.add_argument("--tokens", type=int, default=8192, help="tokens in a step (default: %(default)s)")
    parser.add_argument(
        "--layer", type=int, nargs=2, action="append", metavar=("IN", "OUT"),
        help="a layer's features; may be repeated (default: 4096 4096)",
    )  # fmt: skip
    parser.add_argument("--method", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")


def main(args: argparse.Namespace) -> int:
    """Tune, print, keep. Exit status 1 without a GPU."""
    dtype, stderr = getattr(torch, args.dtype), Console(stderr=True)
    obstacle = triton_obstacle("cuda" if torch.cuda.is_available() else "cpu", dtype)
    if obstacle or not torch.cuda.is_available():
        stderr.print(f"Nothing to tune here: {obstacle or 'there is no GPU'}", markup=False, highlight=False)
        return 1
    make_cache_dir()
    device = torch.device("cuda", torch.cuda.current_device())
    layers = args.layer or [(4096, 4096)]
    shapes = [layer_shape(method, args.tokens, *layer) for layer in layers for method in args.method]
    found = list(run(shapes, dtype, device, lambda fn: _seconds(fn, device)))
    Console().print(table(found, records.gpu(device)[0]))
    return 0


def run(
    shapes: list[Shape], dtype: torch.dtype, device: torch.device, seconds: Callable[[Callable[[], object]], float]
) -> Iterator[Found]:
    """Tune every launch of every shape, each shape once."""
    for shape in dict.fromkeys(shapes):
        for target in targets(shape, dtype, device):
            tries = sum(map(len, target.launch.candidates.values()))
            with bar(f"{target.launch.name}, T={shape.tokens} {shape.depth}x{shape.width}", tries) as progress:
                yield tune(target, device, seconds, progress.advance)


def _seconds(fn: Callable[[], object], device: torch.device) -> float:
    return interleave({"fn": fn}, device=device, rounds=20, warmup=3)["fn"].median


def table(found: list[Found], gpu: str) -> Table:
    """A row for each tuned launch."""
    result = Table(title=f"Tuned on {gpu}; kept in {tuned.path()}", title_justify="left")
    for column in ("launch", "for", "before, us", "after, us", "changed", "tried", "left out"):
        result.add_column(column)
    for each in found:
        chosen = each.launch.choose(*each.arguments)
        changed = {k: v for k, v in dataclasses.asdict(each.best).items() if getattr(chosen, k) != v}
        result.add_row(
            each.launch.name, " ".join(str(value).removeprefix("torch.") for value in each.arguments),
            f"{each.before * 1e6:.1f}", f"{each.after * 1e6:.1f}",
            " ".join(f"{k}={v}" for k, v in changed.items()) or "nothing", str(each.tried),
            ", ".join(f"{count} {why}" for why, count in each.left_out.items()),
        )  # fmt: skip
    return result
