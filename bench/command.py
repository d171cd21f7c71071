"""`gci-kernels bench`: the frozen base, eager PyTorch and gci_kernels, on one layer and on a whole model."""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from torch import nn

from gci_kernels.progress import Bar, bar

from . import report
from .budget import LEAST_ROUNDS, Budget, halvings, largest_fitting
from .cases import LayerCase, floor_of, layer_case, layer_variants, make_inputs
from .correctness import CorrectnessError, check_layer, check_model
from .machine import environment, write_json
from .models import ModelError, load_model
from .products import CANDIDATES, fast_dtypes, product_rates, slowness
from .settings import DTYPES, SIZES, Settings, add_arguments, check_outputs, device_of, settings_of
from .timing import Timing, interleave
from .variants import generations, measure_generation, measure_training, model_variants, random_ids, train_step

__all__ = ["add_arguments", "main"]

SCHEMA = 2
# Of the model's correctness gate: trials, and tokens of each, enough for the plan that a train step is timed with. A
# smaller step's gate has as many tokens as the step.
GATE_TRIALS, GATE_TOKENS = 3, 256
# Seconds for all steps once the first model is loaded: the two and fifteen minutes that are promised, less Python's
# start and one step that takes longer than foretold.
SECONDS = {"quick": 95.0, "full": 840.0}
# The shares of a dtype's steps in its time, as two cores need it.
WEIGHTS = {"layer": 2.0, "training": 14.0, "generate": 5.0, "generate_many": 12.0}
# A layer's sizes, each dimension divided by these.
SHRINKS = {"quick": (8, 4, 2), "full": (8, 4, 2, 1)}
LEAST_SEQ, LEAST_NEW_TOKENS = 8, 4


def main(args: argparse.Namespace) -> int:
    """Measure, print, write. Returns 1, with the reason on stderr and no times, where a result is wrong."""
    check_outputs(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        result = _run(args)
    except CorrectnessError as error:
        print(f"No times are shown: the correctness gate failed.\n{error}", file=sys.stderr)
        return 1
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    report.print_tables(result, Console())
    if args.json:
        write_json(args.json, result)
    if args.plot:
        report.draw(result, args.plot)
    return 0


def _run(args: argparse.Namespace) -> dict:
    device, rates = torch.device(device_of(args)), {}
    if device.type == "cpu":
        wanted = dict.fromkeys([*CANDIDATES, *(args.dtype or ())])
        rates = {name: product_rates(getattr(torch, name)) for name in wanted}
    chosen = fast_dtypes(rates) if rates else tuple(DTYPES)
    settings = settings_of(args, tuple(args.dtype or chosen))
    run = _Run(settings, device, slowness(rates))
    return {
        "schema": SCHEMA,
        **environment(device),
        "settings": asdict(settings),
        "products": {name: asdict(rate) for name, rate in rates.items()},
        "left_out": [] if args.dtype else [name for name in rates if name not in chosen],
        **run.results(),
        "shrunk": run.shrunk,
        "out_of_time": run.out_of_time,
    }


class _Run:
    """The steps of a run, each of which gets its share of the time; of dtypes, the slower one gets more of it.

    Args:
        slowness: dtype -> how long it takes, in any unit; the same for all where it is not known.
    """

    def __init__(self, settings: Settings, device: torch.device, slowness: dict[str, float]) -> None:
        self.settings, self.device = settings, device
        self.shrunk: list[dict] = []
        self.out_of_time: list[str] = []  # dtypes for which nothing was left
        self._budget: Budget
        self._bar: Bar
        self._dtype, self._begun = "", 0  # the steps so far
        parts = {"layer": True, "training": settings.models, "generate": settings.models}
        parts["generate_many"] = settings.models and settings.many > 0
        weights = [WEIGHTS[part] for part, there in parts.items() if there]
        self._weights = [weight * slowness.get(dtype, 1.0) for dtype in settings.dtypes for weight in weights]

    def results(self) -> dict[str, list]:
        """The layers and models, dtype by dtype."""
        settings, layers, models = self.settings, [], []
        with bar("starting", sum(self._weights)) as self._bar:
            for self._dtype in settings.dtypes:
                if self._begun and self._budget.left() <= 0 and "dtype" not in settings.fixed:
                    self.out_of_time.append(self._dtype)
                    continue
                loaded = self._load() if settings.models else None
                if self._begun == 0:  # fetching a model takes no time from the steps
                    self._start_the_clock()
                layer = self._layer()
                if settings.layers:
                    layers.append(layer)
                if loaded:
                    models.append(self._model(*loaded))
        return {"layers": layers, "models": models}

    def _start_the_clock(self) -> None:
        seconds = SECONDS["quick" if self.settings.quick else "full"]
        self._budget = Budget(seconds, self._weights)
        if not {*SIZES} & {*self.settings.fixed}:
            self._bar.limit(seconds)

    def _begin(self, what: str) -> None:
        """The next step."""
        self._budget.begin_step()
        self._bar.completed = sum(self._weights[: self._begun])
        self._begun += 1
        self._tell(what)

    def _tell(self, what: str) -> None:
        self._bar.step(f"{self._dtype}: {what}")

    def _advance(self, what: str) -> Callable[[int, int], None]:
        """Tells of so many done of so many."""
        first, weight = self._bar.completed, sum(self._weights[: self._begun]) - self._bar.completed

        def advance(done: int, of: int) -> None:
            self._bar.reach(first + weight * done / of, f"{done} of {of} {what}")

        return advance

    def _how(self) -> dict[str, Any]:
        """How interleave is to repeat the present step."""
        rounds = self.settings.rounds
        least = rounds if "rounds" in self.settings.fixed else LEAST_ROUNDS
        return dict(rounds=rounds, least=least, left=self._budget.step_left, advance=self._advance("rounds"))

    def _note(self, what: str, wanted: object, used: object) -> None:
        if used != wanted:
            self.shrunk.append({"dtype": self._dtype, "what": what, "wanted": wanted, "used": used})

    def _load(self) -> tuple:
        self._tell(f"loading {self.settings.model}")
        return load_model(self.settings.model, getattr(torch, self._dtype), self.device, log=self._tell)

    def _layer(self) -> dict:
        """The gate, which the model's gate builds on; and the times, where they are asked for."""
        settings, dtype = self.settings, getattr(torch, self._dtype)
        self._begin("checking one layer")
        shrinks = SHRINKS["quick" if settings.quick else "full"]
        cases = [layer_case(settings.method, dtype, settings.adapter(dtype), shrink=shrink) for shrink in shrinks]
        # The gate's steps and its truth, a round to warm up, and those that are timed.
        times = 4 + (1 + LEAST_ROUNDS) * settings.layers
        case = largest_fitting(
            cases, self._layer_round, work=_products, whole=lambda case: times * _products(case),
            left=self._budget.step_left,
        )  # fmt: skip
        self._note("layer", _size(cases[-1]), _size(case))
        inputs = make_inputs(case, self.device)
        variants = layer_variants(inputs)
        result = {
            "case": {k: str(v).removeprefix("torch.") if "dtype" in k else v for k, v in asdict(case).items()},
            "name": case.name,
        }
        result["errors"] = check_layer(inputs, variants)
        if settings.layers:
            self._tell("timing one layer")
            fns = {name: variant.step for name, variant in variants.items()}
            before = {name: variant.change for name, variant in variants.items()}
            times = interleave(fns, device=self.device, before=before, **self._how())
            result.update(self._compare("timing the layer", times))
            result["floor_seconds"] = floor_of(case, self.device)
        return result

    def _layer_round(self, case: LayerCase) -> None:
        for variant in layer_variants(make_inputs(case, self.device)).values():
            variant.step()

    def _model(self, model: nn.Module, tokenizer: Any) -> dict:
        settings = self.settings
        self._tell("adapting the model")
        variants = model_variants(model, settings.method, settings.adapter(model.dtype))
        result = {
            "name": settings.model,
            "dtype": self._dtype,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "trainable": sum(p.numel() for p in variants["gci"].parameters() if p.requires_grad),
            **self._train(variants),
        }
        for part, batch in {"generate": 1, "generate_many": settings.many}.items():
            if batch:
                result[part] = self._generate(part, variants, tokenizer, batch)
        return result

    def _train(self, variants: dict[str, nn.Module]) -> dict[str, dict]:
        """The gate's errors, and what a train step takes."""
        settings = self.settings
        self._begin("finding the size of a train step")
        batch, seq = self._train_size(variants)
        self._note("train step", f"{settings.batch}x{settings.seq}", f"{batch}x{seq}")
        errors = self._check(variants, gate_tokens(batch, seq))
        self._tell(f"training, {batch}x{seq} tokens")
        seconds, needs = measure_training(variants, batch=batch, seq=seq, **self._how())
        train = {**self._compare("training", seconds, tokens=batch * seq), **needs, "batch": batch, "seq": seq}
        frozen_saved = train["saved"]["frozen"]
        train["saved_by_adapters"] = {name: train["saved"][name] - frozen_saved for name in ("eager", "gci")}
        return {"errors": errors, "train": train}

    def _check(self, variants: dict[str, nn.Module], tokens: int) -> dict:
        """The model's gate, which may take half of what is left of the step, for the times need the rest."""
        self._tell(f"checking the loss and gradients of {tokens} tokens")
        for_times, trials = self._budget.step_left() / 2, 0

        def advance(done: int, of: int) -> None:
            nonlocal trials
            trials = done
            self._bar.step(self._bar.text, f"{done} of {of} trials")

        ids = random_ids(variants["frozen"], GATE_TRIALS, tokens)
        errors = check_model(variants, ids, left=lambda: self._budget.step_left() - for_times, advance=advance)
        self._note("trials of the model's gate", GATE_TRIALS, trials)
        return errors

    def _train_size(self, variants: dict[str, nn.Module]) -> tuple[int, int]:
        """Sequences and their tokens: what is asked for, or the largest halving of one of them that fits."""
        settings = self.settings
        sizes = [(settings.batch, settings.seq)]
        if "seq" not in settings.fixed:
            sizes = [(settings.batch, seq) for seq in halvings(settings.seq, LEAST_SEQ)]
        elif "batch" not in settings.fixed:
            sizes = [(batch, settings.seq) for batch in halvings(settings.batch, 1)]

        def round_of(size: tuple[int, int]) -> None:
            ids = random_ids(variants["frozen"], *size)
            for model in variants.values():
                train_step(model, ids)

        # The timed rounds, one for the peak and one for what is saved; the gate's steps and its float64 model's.
        return largest_fitting(
            sizes, round_of, work=math.prod, left=self._budget.step_left,
            whole=lambda size: (LEAST_ROUNDS + 2) * math.prod(size) + 3 * gate_tokens(*size),
        )  # fmt: skip

    def _generate(self, part: str, variants: dict[str, nn.Module], tokenizer: Any, batch: int) -> dict:
        settings, what = self.settings, "generating" if batch == 1 else f"generating {batch} sequences together"
        self._begin(what)
        counts = [settings.new_tokens]
        if "new_tokens" not in settings.fixed:
            counts = halvings(settings.new_tokens, LEAST_NEW_TOKENS)

        def round_of(new_tokens: int) -> None:
            for call in generations(variants, tokenizer, batch=batch, new_tokens=new_tokens).values():
                call()

        new_tokens = largest_fitting(
            counts, round_of, work=float, left=self._budget.step_left,
            whole=lambda count: (LEAST_ROUNDS + 1) * count,
        )  # fmt: skip
        self._note(f"new tokens, {what}", settings.new_tokens, new_tokens)
        seconds, agreement = measure_generation(variants, tokenizer, batch=batch, new_tokens=new_tokens, **self._how())
        return {**self._compare(what, seconds, tokens=batch * new_tokens), **agreement, "batch": batch}

    def _compare(self, what: str, seconds: dict[str, Timing], tokens: int | None = None) -> dict:
        """Times by variant, their ratios and, for a given number of tokens, the tokens a second: all JSON."""
        self._note(f"rounds of {what}", self.settings.rounds, len(seconds["frozen"].samples))
        result = {
            "seconds": {name: asdict(timing) for name, timing in seconds.items()},
            "tax": {name: asdict(seconds[name] / seconds["frozen"]) for name in ("eager", "gci")},
            "speedup": asdict(seconds["eager"] / seconds["gci"]),
        }
        if tokens:
            result["tokens"] = tokens
            result["tokens_per_second"] = {name: asdict(timing.rate(tokens)) for name, timing in seconds.items()}
        return result


def gate_tokens(batch: int, seq: int) -> int:
    """The tokens of a trial of the gate in front of a train step of such a size: the same plan computes both."""
    return min(GATE_TOKENS, batch * seq)


def _products(case: LayerCase) -> float:
    """What a layer's work is proportional to."""
    return case.tokens * case.in_features * case.out_features


def _size(case: LayerCase) -> str:
    return f"{case.tokens} tokens, {case.in_features} to {case.out_features}"
