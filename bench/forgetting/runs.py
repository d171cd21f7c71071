"""One run: a method and a seed, from the untouched model to a result that is kept as JSON."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from ..machine import commit
from .evaluate import Evaluator, Point
from .gates import mean_gates
from .materials import Materials
from .methods import Method, adapt
from .training import History, Schedule, train


class Runs:
    """The runs of one comparison; each ends as `folder`/NAME-RATE-SEED.json, and is not made again if that is there."""

    def __init__(
        self, folder: Path, materials: Materials, load: Callable[[torch.dtype], nn.Module], schedule: Schedule
    ) -> None:
        self.folder, self.materials, self.load, self.schedule = folder, materials, load, schedule
        folder.mkdir(parents=True, exist_ok=True)
        self.evaluator: Evaluator | None = None

    def path(self, name: str, method: Method, seed: int) -> Path:
        return self.folder / f"{name}-{method.learning_rate:g}-{seed}.json"

    @staticmethod
    def read(path: Path) -> dict:
        return json.loads(path.read_text())

    def _evaluator(self) -> Evaluator:
        """Made when a run first needs it: it reads the general material with the untouched model."""
        if self.evaluator is None:
            untouched = self.load(torch.bfloat16).eval()
            found = self.materials
            self.evaluator = Evaluator(untouched, found.tokenizer, found.held_out(), found.chat)
        return self.evaluator

    def untouched(self) -> dict:
        """The model that all start from, as a result like theirs."""
        path = self.folder / "untouched.json"
        if not path.exists():
            model = self.load(torch.bfloat16).eval()
            evaluator = self._evaluator()
            point = evaluator.point(model, 0, 0)
            _write(path, {"points": [point.json()], "answers": evaluator.answers(model)})
        return self.read(path)

    def run(
        self, name: str, method: Method, seed: int, after: Callable[[History], None], *, trial: bool = False
    ) -> dict:
        """The result of a run, made now or found. `after` is called after every look at the model.

        `trial`: of a rate; questions are not asked of the model.
        """
        path = self.path(name, method, seed)
        if not path.exists():
            kept = path.with_suffix(".partial")
            _write(path, self._result(name, method, seed, kept, after, trial))
            kept.unlink(missing_ok=True)
        return self.read(path)

    def _result(
        self, name: str, method: Method, seed: int, kept: Path, after: Callable[[History], None], trial: bool
    ) -> dict:
        evaluator, materials = self._evaluator(), self.materials
        examples, counts = materials.examples(seed, method.rega)
        model = adapt(self.load(torch.bfloat16), method, materials.scores, seed)
        start = Point(**self.untouched()["points"][0])
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def look(step: int, tokens: int) -> Point:
            return evaluator.point(_as_used(model, method), step, tokens)

        history = train(
            model, examples, self.schedule, start, look, kept, learning_rate=method.learning_rate,
            pad=materials.tokenizer.pad_token_id, seed=seed, after=after,
        )  # fmt: skip
        used = _as_used(model.eval(), method)
        gated = "loramoe" in name and not method.eager
        return {
            "method": name,
            "title": method.title,
            "seed": seed,
            "learning_rate": method.learning_rate,
            "trainable": sum(parameter.numel() for parameter in trained),
            "points": [point.json() for point in history.points],
            "matched": matched(history.points, self.schedule.target),
            "answers": None if trial else evaluator.answers(used),
            "losses": history.losses,
            "seconds": history.seconds,
            "tokens": history.tokens,
            "memory": {
                "weights": sum(parameter.nbytes for parameter in model.parameters()),
                # AdamW's two moments, in the parameters' dtype.
                "optimizer": 2 * sum(parameter.nbytes for parameter in trained),
                "step": history.memory,
            },
            "gates": mean_gates(model, evaluator.domain) if gated else None,
            "mixture": counts,
            "commit": commit(),
        }


def _as_used(model: nn.Module, method: Method) -> nn.Module:
    """The model in the form that is looked at: every weight trained in float32 is deployed in bfloat16 as all are."""
    return copy.deepcopy(model).bfloat16() if method.config is None else model


def matched(points: list[Point], target: float) -> dict | None:
    """What the run was like where its domain loss was `target`, between two looks in a straight line.

    None where it never was.
    """
    for before, past in zip(points, points[1:], strict=False):
        if past.domain_loss <= target < before.domain_loss:
            share = (before.domain_loss - target) / (before.domain_loss - past.domain_loss)
            return {
                name: old + share * (new - old)
                for (name, old), new in zip(asdict(before).items(), asdict(past).values(), strict=True)
            }
    return None


def _write(path: Path, value: dict) -> None:
    """Whole or not at all."""
    scratch = path.with_suffix(".writing")
    scratch.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(scratch, path)
