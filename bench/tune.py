"""`gci-kernels tune`: faster launch configurations of the Triton kernels for given shapes, found by trying, and kept.

Each kernel of a training step is tried with one field of its configuration changed at a time, the best value kept
before the next field. What does not compile, or is wrong, is left out. hardware/tuned.py keeps what won and
answers with it from then on.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.files import make_cache_dir
from gci_kernels.hardware import kernels, records, tuned
from gci_kernels.impl import triton_obstacle
from gci_kernels.ops.bottleneck import aten
from gci_kernels.ops.row_linear import aten as row_aten
from gci_kernels.progress import bar

from .cases import RANKS
from .timing import interleave

#: Less is noise, and not worth another configuration.
WORTHWHILE = 0.98


@dataclass(frozen=True)
class Target:
    """One launch to tune: the stage, and the same in the library of the same operands, each passed through `widen`."""

    launch: str
    dtype: torch.dtype
    run: Callable[[], Tensor]
    library: Callable[[Callable[[Tensor], Tensor]], Tensor]


def _drawing(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """Makes random matrices of so many rows and columns, the same ones every time."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, generator=generator, device=device) * scale).to(dtype)

    return draw


def row_targets(
    tokens: int, features_in: int, features_out: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Target]:
    """The launches of forward and dX of a layer of whose rows a tenth is trained."""
    from gci_kernels.ops.row_linear import triton

    draw, k = _drawing(dtype, device), max(features_out // 10, 1)
    x, dy = draw(tokens, features_in), draw(tokens, features_out)
    w, active = (draw(rows, features_in, features_in**-0.5) for rows in (features_out, k))
    positions = torch.randperm(features_out, device=device)[:k]
    yield Target(
        "row_linear", dtype,
        lambda: triton.forward(x, w, None, active, positions, "triton"),
        lambda widen: row_aten.forward(widen(x), widen(w), None, widen(active), positions, "merge"),
    )  # fmt: skip
    yield Target(
        "row_linear", dtype,
        lambda: triton.dx(dy, w, active, positions, dy[:, :0], "triton"),
        lambda widen: row_aten.dx(widen(dy), widen(w), widen(active), positions, dy[:, :0], "merge"),
    )  # fmt: skip


def targets(
    tokens: int, features_in: int, features_out: int, rank: int, experts: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Target]:
    """The launches of one adapted layer's forward and backward, adapters in `dtype`."""
    from gci_kernels.ops.bottleneck import triton

    draw = _drawing(dtype, device)

    def target(
        kernel: str, run: Callable[[], Tensor], library: Callable[[Callable[[Tensor], Tensor]], Tensor]
    ) -> Target:
        return Target(kernel, dtype, run, library)

    columns = rank + experts
    x, dy, w = draw(tokens, features_in), draw(tokens, features_out), draw(features_out, features_in, features_in**-0.5)
    stack, B = draw(columns, features_in, features_in**-0.5), draw(features_out, rank, rank**-0.5)
    u, dh = draw(tokens, rank), draw(tokens, columns)
    yield target(
        "project", lambda: triton.project(x, stack.t()), lambda widen: aten.project(widen(x), widen(stack).t())
    )
    yield target(
        "expand",
        lambda: triton.expand(u, B.t(), x, w.t(), None),
        lambda widen: aten.expand(widen(u), widen(B).t(), widen(x), widen(w).t(), None),
    )
    if triton.one_reading(dy, rank):
        yield target(
            "project_reduce",
            lambda: triton.project_reduce(dy, B, u)[1],
            lambda widen: aten.reduce(widen(u), widen(dy)),
        )
    else:
        yield target("project", lambda: triton.project(dy, B), lambda widen: aten.project(widen(dy), widen(B)))
        yield target("reduce", lambda: triton.reduce(u, dy), lambda widen: aten.reduce(widen(u), widen(dy)))
    yield target(
        "expand",
        lambda: triton.expand(dh, stack, dy, w, None),
        lambda widen: aten.expand(widen(dh), widen(stack), widen(dy), widen(w), None),
    )
    yield target("reduce", lambda: triton.reduce(dh, x), lambda widen: aten.reduce(widen(dh), widen(x)))


@dataclass(frozen=True)
class Found:
    """What tuning one launch came to."""

    launch: str
    arguments: tuple
    before: float  # seconds
    after: float
    best: object
    tried: int
    left_out: dict[str, int]  # why -> how many


def tune(
    target: Target, device: torch.device, seconds: Callable[[Callable[[], object]], float],
    advance: Callable[[], None] = lambda: None,
) -> Found:  # fmt: skip
    """Try the fields of the target's configuration in turn and keep the best where it is worth it."""
    with tuned.requests() as requests:
        target.run()
    arguments = next(arguments for name, arguments in requests if name == target.launch)
    _, launch = kernels.get_launch(target.launch)
    chosen = best = launch.choose(*arguments)
    truth = target.library(lambda tensor: tensor.double())
    plain = relative_error(target.library(lambda tensor: tensor), truth)

    def time(candidate: object) -> float | str:
        """Seconds, or why there are none."""
        with tuned.trying(launch.name, candidate):
            try:
                error = relative_error(target.run(), truth)
            except Exception as failure:  # a compiler's refusal comes as many types; it is counted and shown
                return type(failure).__name__
            return seconds(target.run) if error <= error_bound(plain, target.dtype) else "wrong"

    before = after = time(chosen)
    if isinstance(before, str):
        raise RuntimeError(f"{launch.name} {arguments} fails with the configuration chosen for it, {chosen}: {before}")
    tried, left_out = 0, {}
    for field, values in launch.candidates.items():
        for value in values:
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
    return Found(launch.name, arguments, before, after, best, tried, left_out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=8192, help="tokens in a step (default: %(default)s)")
    parser.add_argument(
        "--layer", type=int, nargs=2, action="append", metavar=("IN", "OUT"),
        help="a layer's features; may be repeated (default: 4096 4096)",
    )  # fmt: skip
    methods = ["lora", "loramoe", "loki"]
    parser.add_argument("--method", choices=methods, nargs="+", default=methods)
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
    shapes = [(args.tokens, *layer, *_columns(method)) for layer in layers for method in args.method]
    found = list(run(shapes, dtype, device, lambda fn: _seconds(fn, device)))
    Console().print(table(found, records.gpu(device)[0]))
    return 0


def _columns(method: str) -> tuple[int, ...]:
    """Columns of B, and experts; LoKI has neither."""
    if method == "loki":
        return ()
    rank, experts = RANKS[method]
    return rank * experts, experts if method == "loramoe" else 0


def run(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device,
    seconds: Callable[[Callable[[], object]], float],
) -> Iterator[Found]:  # fmt: skip
    """Tune every launch of every shape: (tokens, in, out, columns of B, experts), or of LoKI (tokens, in, out)."""
    for shape in shapes:
        made = row_targets if len(shape) == 3 else targets
        for target in made(*shape, dtype, device):
            candidates = kernels.get_launch(target.launch)[1].candidates
            with bar(f"{target.launch} {shape}", sum(map(len, candidates.values()))) as progress:
                yield tune(target, device, seconds, progress.advance)


def _seconds(fn: Callable[[], object], device: torch.device) -> float:
    return interleave({"fn": fn}, device=device, rounds=20, warmup=3)["fn"].median


def table(found: list[Found], gpu: str) -> Table:
    result = Table(title=f"Tuned on {gpu}; kept in {tuned.path()}", title_justify="left")
    for column in ("launch", "for", "before, us", "after, us", "changed", "tried", "left out"):
        result.add_column(column)
    for each in found:
        chosen = kernels.get_launch(each.launch)[1].choose(*each.arguments)
        changed = {k: v for k, v in dataclasses.asdict(each.best).items() if getattr(chosen, k) != v}
        result.add_row(
            each.launch, " ".join(str(value).removeprefix("torch.") for value in each.arguments),
            f"{each.before * 1e6:.1f}", f"{each.after * 1e6:.1f}",
            " ".join(f"{k}={v}" for k, v in changed.items()) or "nothing", str(each.tried),
            ", ".join(f"{count} {why}" for why, count in each.left_out.items()),
        )  # fmt: skip
    return result
