"""`gci-kernels bench`: the frozen base, eager PyTorch and gci_kernels, on one layer and on a whole model."""

import argparse
import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import report
from .cases import METHODS, floor_of, layer_case, layer_variants, make_inputs
from .correctness import CorrectnessError, check_layer, check_model
from .machine import commit, machine, versions
from .models import RANDOM_LLAMAS, ModelError, load_model
from .timing import Timing, interleave
from .variants import measure_generation, measure_training, model_variants, random_ids

SCHEMA = 1
# Trials and tokens of the model's correctness gate: enough tokens for the plan that a train step is timed with.
GATE_SHAPE = (3, 64)
DTYPES = ["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Settings:
    """The options, with their defaults filled in."""

    model: str
    method: str
    dtypes: tuple[str, ...]
    device: str
    batch: int
    seq: int
    new_tokens: int
    many: int  # sequences generated together, beside one alone; 0: not measured
    rounds: int
    adapter_dtype: str
    quick: bool
    layers: bool
    models: bool

    def adapter(self, dtype: torch.dtype) -> torch.dtype:
        """The adapters' dtype in a model of `dtype`."""
        return torch.float32 if self.adapter_dtype == "float32" else dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = "|".join(RANDOM_LLAMAS)
    parser.add_argument(
        "--model", default="smollm2", help=f"smollm2 (default), random-llama[:{sizes}], a local folder, or a hub id"
    )
    parser.add_argument("--method", choices=METHODS, default="loramoe")
    parser.add_argument(
        "--dtype", choices=DTYPES, nargs="+", help="default: float32 and bfloat16; on CUDA, float16 as well"
    )
    parser.add_argument(
        "--adapter-dtype",
        choices=["model", "float32"],
        default="model",
        help="model (default): adapters in the model's dtype; float32: PEFT's default, slower in eager PyTorch",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--batch", type=_positive, default=2, help="sequences in a train step (default: %(default)s)")
    parser.add_argument("--seq", type=_positive, help="tokens in a sequence (default: 256; --quick: 128)")
    parser.add_argument("--new-tokens", type=_positive, help="tokens to generate (default: 32; --quick: 16)")
    parser.add_argument("--rounds", type=_positive, help="how often each variant is timed (default: 10; --quick: 3)")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's own choice)")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--layers-only", action="store_true", help="time single layers, no model")
    part.add_argument("--model-only", action="store_true", help="time the model, no single layers")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller sizes: two minutes on 2 cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, every sample included")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the model's numbers")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def main(args: argparse.Namespace) -> int:
    """Measure, print, write. Returns 1, with the reason on stderr and no times, where a result is wrong."""
    settings = _settings(args)
    _check_outputs(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    stderr = Console(stderr=True)
    try:
        result = _run(settings, stderr)
    except CorrectnessError as error:
        stderr.print(f"No times are shown: the correctness gate failed.\n{error}", markup=False, highlight=False)
        return 1
    except ModelError as error:
        stderr.print(str(error), markup=False, highlight=False)
        return 1
    report.print_tables(result, Console())
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        report.draw(result, args.plot)
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Settings(
        model=args.model,
        method=args.method,
        dtypes=tuple(args.dtype or (DTYPES if device == "cuda" else DTYPES[:2])),
        device=device,
        batch=args.batch,
        seq=args.seq or (128 if args.quick else 256),
        new_tokens=args.new_tokens or (16 if args.quick else 32),
        many=0 if args.quick else 8,
        rounds=args.rounds or (3 if args.quick else 10),
        adapter_dtype=args.adapter_dtype,
        quick=args.quick,
        layers=not args.model_only,
        models=not args.layers_only,
    )


def _check_outputs(args: argparse.Namespace) -> None:
    """Find out before the minutes of measuring, not after, that the results can't be written."""
    for path in (args.json, args.plot):
        if path and not path.resolve().parent.is_dir():
            raise SystemExit(f"{path}: its folder does not exist")
    if args.plot and args.layers_only:
        raise SystemExit("--plot draws the model's numbers: leave out --layers-only")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install 'gci_kernels[bench]'")


def _run(settings: Settings, stderr: Console) -> dict:
    device = torch.device(settings.device)
    result: dict = {
        "schema": SCHEMA,
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "settings": asdict(settings),
        "layers": [],
        "models": [],
    }
    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, console=stderr, transient=True) as progress:
        steps = (
            settings.layers * (settings.rounds + 1) + settings.models * (3 if settings.many else 2) * settings.rounds
        )
        task = progress.add_task("starting", total=len(settings.dtypes) * steps)
        for dtype in settings.dtypes:

            def step(what: str, dtype: str = dtype) -> Callable[[], None]:
                progress.update(task, description=f"{dtype}: {what}")
                return lambda: progress.advance(task)

            layer = _layer(settings, getattr(torch, dtype), device, step)
            if settings.layers:
                result["layers"].append(layer)
            if settings.models:
                result["models"].append(_model(settings, dtype, device, step, progress.console.print))
    return result


def _layer(settings: Settings, dtype: torch.dtype, device: torch.device, step: Callable) -> dict:
    """The gate, which the model's gate builds on; and the times, where they are asked for."""
    case = layer_case(settings.method, dtype, settings.adapter(dtype), quick=settings.quick)
    inputs = make_inputs(case, device)
    variants = layer_variants(inputs)
    step("checking one layer")
    result = {
        "case": {k: str(v).removeprefix("torch.") if "dtype" in k else v for k, v in asdict(case).items()},
        "name": case.name,
    }
    result["errors"] = check_layer(inputs, variants)
    if settings.layers:
        fns = {name: variant.step for name, variant in variants.items()}
        advance = step("timing one layer")
        before = {name: variant.change for name, variant in variants.items()}
        times = interleave(fns, device=device, rounds=settings.rounds, before=before, advance=advance)
        result.update(_compare(times))
        result["floor_seconds"] = floor_of(case, device)
    return result


def _model(settings: Settings, dtype: str, device: torch.device, step: Callable, tell: Callable) -> dict:
    step(f"loading {settings.model}")
    model, tokenizer = load_model(settings.model, getattr(torch, dtype), device, tell=tell)
    variants = model_variants(model, settings.method, settings.adapter(model.dtype))
    step("checking the model's loss and gradients")
    errors = check_model(variants, random_ids(model, *GATE_SHAPE))
    seconds, needs = measure_training(
        variants, batch=settings.batch, seq=settings.seq, rounds=settings.rounds, advance=step("training")
    )
    train = {**_compare(seconds, tokens=settings.batch * settings.seq), **needs}
    frozen_saved = train["saved"]["frozen"]
    train["saved_by_adapters"] = {name: train["saved"][name] - frozen_saved for name in ("eager", "gci")}
    generated = {}
    for part, batch in {"generate": 1, "generate_many": settings.many}.items():
        if batch:
            what = dict(batch=batch, new_tokens=settings.new_tokens, rounds=settings.rounds)
            seconds, agreement = measure_generation(variants, tokenizer, **what, advance=step("generating"))
            generated[part] = {**_compare(seconds, tokens=batch * settings.new_tokens), **agreement, "batch": batch}
    return {
        "name": settings.model,
        "dtype": dtype,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in variants["gci"].parameters() if parameter.requires_grad),
        "errors": errors,
        "train": train,
        **generated,
    }


def _compare(seconds: dict[str, Timing], tokens: int | None = None) -> dict:
    """Times by variant, their ratios and, for a given number of tokens, the tokens a second: all JSON."""
    result = {
        "seconds": {name: asdict(timing) for name, timing in seconds.items()},
        "tax": {name: asdict(seconds[name] / seconds["frozen"]) for name in ("eager", "gci")},
        "speedup": asdict(seconds["eager"] / seconds["gci"]),
    }
    if tokens:
        result["tokens"] = tokens
        result["tokens_per_second"] = {name: asdict(timing.rate(tokens)) for name, timing in seconds.items()}
    return result
