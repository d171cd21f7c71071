"""One run: a method and a seed, from the original model to a result that is stored as JSON."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from ..machine import commit, write_json
from .evaluate import Evaluator, Point
from .gates import mean_gates
from .materials import Materials
from .methods import Method, adapt
from .training import History, Schedule, train


class Runs:
    """The runs of one comparison. A run's result is `folder`/NAME-RATE-SEED.json; where that exists it is not repeated.

    Args:
        folder: created where it does not exist.
        materials: prepared.
        load: gives the original model in a dtype.
        schedule: that of every run.
    """

    def __init__(
        self, folder: Path, materials: Materials, load: Callable[[torch.dtype], nn.Module], schedule: Schedule
    ) -> None:
        self.folder, self.materials, self.load, self.schedule = folder, materials, load, schedule
        folder.mkdir(parents=True, exist_ok=True)
        self.evaluator: Evaluator | None = None

    def path(self, name: str, method: Method, seed: int) -> Path:
        """The file of a run's result."""
        return self.folder / f"{name}-{method.learning_rate:g}-{seed}.json"

    @staticmethod
    def read(path: Path) -> dict:
        """A result."""
        return json.loads(path.read_text())

    def _evaluator(self) -> Evaluator:
        """Made when a run first needs it, as it computes the original model's logits on the general material."""
        if self.evaluator is None:
            found = self.materials
            untouched = self.load(torch.bfloat16).eval()
            self.evaluator = Evaluator(untouched, found.tokenizer, found.held_out(), found.chat)
        return self.evaluator

    def untouched(self) -> dict:
        """The original model's evaluation, in the form of a result."""
        path = self.folder / "untouched.json"
        if not path.exists():
            model = self.load(torch.bfloat16).eval()
            evaluator = self._evaluator()
            point = evaluator.point(model, 0, 0)
            write_json(path, {"points": [asdict(point)], "answers": evaluator.answers(model)})
        return self.read(path)

    def run(
        self, name: str, method: Method, seed: int, after: Callable[[History], None], *, trial: bool = False
    ) -> dict:
        """The result of a run, computed or read.

        Args:
            name: the method's, for the result.
            method: what to train.
            seed: of the examples' order and the adapters' initial weights.
            after: called after every evaluation.
            trial: whether it is a trial of a learning rate, which generates no answers.
        """
        path = self.path(name, method, seed)
        if not path.exists():
            checkpoint = path.with_suffix(".partial")
            write_json(path, self._result(name, method, seed, checkpoint, after, trial))
            checkpoint.unlink(missing_ok=True)
        return self.read(path)

    def _result(
        self, name: str, method: Method, seed: int, checkpoint: Path, after: Callable[[History], None], trial: bool
    ) -> dict:
        evaluator, materials = self._evaluator(), self.materials
        examples, counts = materials.examples(seed, method.rega)
        model = adapt(self.load(torch.bfloat16), method, materials.scores, seed)
        start = Point(**self.untouched()["points"][0])
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def evaluate(step: int, tokens: int) -> Point:
            return evaluator.point(_as_used(model, method), step, tokens)

        history = train(
            model, examples, self.schedule, start, evaluate, checkpoint, learning_rate=method.learning_rate,
            pad=materials.tokenizer.pad_token_id, seed=seed, after=after,
        )  # fmt: skip
        used = _as_used(model.eval(), method)
        return {
            "method": name,
            "title": method.title,
            "seed": seed,
            "learning_rate": method.learning_rate,
            "trainable": sum(parameter.numel() for parameter in trained),
            "points": [asdict(point) for point in history.points],
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
            "gates": mean_gates(model, evaluator.domain),
            "mixture": counts,
            "commit": commit(),
        }


def _as_used(model: nn.Module, method: Method) -> nn.Module:
    """The model as it would be deployed: in bfloat16, also where all weights were trained in float32."""
    return copy.deepcopy(model).bfloat16() if method.config is None else model


def matched(points: list[Point], target: float) -> dict | None:
    """The evaluation at the domain loss `target`, interpolated linearly between the two points around it.

    None where the target was not reached.
    """
    for before, after in zip(points, points[1:], strict=False):
        if after.domain_loss <= target < before.domain_loss:
            share = (before.domain_loss - target) / (before.domain_loss - after.domain_loss)
            return {
                name: old + share * (new - old)
                for (name, old), new in zip(asdict(before).items(), asdict(after).values(), strict=True)
            }
    return None
