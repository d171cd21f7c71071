"""Trains one adapted model to the domain loss that all methods are compared at, and records the cost."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from ..timing import peak_memory
from .batches import Batch, Example, collate
from .evaluate import Point

WARMUP = 4


@dataclass(frozen=True)
class Schedule:
    """How long a run lasts and how often it is evaluated.

    Attributes:
        batch: examples in a step.
        every: steps between two evaluations.
        steps: the largest number of steps.
        target: the held-out domain loss at which a run ends.
    """

    batch: int
    every: int
    steps: int
    target: float


@dataclass
class History:
    """The record of a run so far, stored with its checkpoint, so that a killed run resumes at its last evaluation.

    Attributes:
        points: the evaluations.
        losses, seconds, tokens: of each step.
        memory: the peak of a step's memory, in bytes.
    """

    points: list[Point] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    memory: int | None = None

    @property
    def done(self) -> int:
        """The number of steps done."""
        return len(self.losses)


def train(
    model: nn.Module,
    examples: Sequence[Example],
    schedule: Schedule,
    start: Point,
    evaluate: Callable[[int, int], Point],
    checkpoint: Path,
    *,
    learning_rate: float,
    pad: int,
    seed: int,
    after: Callable[[History], None] = lambda history: None,
) -> History:
    """Trains the trainable parameters of `model` until an evaluation finds the target, or for all steps.

    AdamW with a constant rate after a few steps of warm-up, no decay, the gradient's norm clipped to 1. The loss is the
    mean over the answers' tokens, plus LoRAMoE's balance constraint where the adapter has it. `seed` determines the
    order of the examples; every pass has another order.

    Args:
        model: with an adapter, or with all weights trainable.
        examples: the training examples.
        schedule: the run's.
        start: the original model's evaluation, which is also that of the adapted one before its first step.
        evaluate: evaluates the model, in evaluation mode, given the numbers of steps and tokens so far.
        checkpoint: the file that holds a run between two evaluations. The caller removes it.
        learning_rate: AdamW's.
        pad: the token id for padding.
        seed: of the examples' order.
        after: called after every evaluation.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.0)
    history = _resume(checkpoint, parameters, optimizer) or History(points=[start])
    batches = batches_of(examples, schedule.batch, schedule.steps, seed)
    while history.done < schedule.steps and history.points[-1].domain_loss > schedule.target:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (history.done + 1) / WARMUP)
        batch = collate([examples[row] for row in batches[history.done]], pad)
        model.train()
        step = partial(_step, model, batch, optimizer, history)
        if history.done == 1:  # not the first, which also allocates the optimizer's moments
            history.memory = peak_memory(step, torch.device("cpu"))
        else:
            step()
        if history.done % schedule.every == 0 or history.done == schedule.steps:
            model.eval()
            history.points.append(evaluate(history.done, sum(history.tokens)))
            _save_checkpoint(checkpoint, parameters, optimizer, history)
            after(history)
    return history


def _step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, history: History) -> None:
    start = time.perf_counter()
    balance = {"task_types": batch.task_types} if _has_balance_constraint(model) else {}
    logits, output = batch.logits(model, **balance)
    loss = batch.losses(logits).mean()
    (loss + output["balance_loss"] if balance else loss).backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    history.seconds.append(time.perf_counter() - start)
    history.losses.append(loss.item())
    history.tokens.append(batch.tokens)


def _has_balance_constraint(model: nn.Module) -> bool:
    config = getattr(model, "peft_config", {}).get("default")
    return getattr(config, "balance_weight", 0.0) > 0


def batches_of(examples: Sequence[Example], size: int, steps: int, seed: int) -> list[list[int]]:
    """Indices of the examples of each of `steps` steps: one shuffled pass after another.

    The examples of four consecutive batches are sorted by length, divided into four batches again, and these are
    shuffled: half as much padding as in batches of shuffled examples.
    """
    random, order = Random(seed), []
    while len(order) < size * steps:
        one_pass = list(range(len(examples)))
        random.shuffle(one_pass)
        order += one_pass
    batches: list[list[int]] = []
    for first in range(0, size * steps, 4 * size):
        window = sorted(order[first : first + 4 * size], key=lambda index: len(examples[index].ids))
        by_length = [window[start : start + size] for start in range(0, len(window), size)]
        batches += random.sample(by_length, len(by_length))
    return batches[:steps]


def _save_checkpoint(
    checkpoint: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, history: History
) -> None:
    state = {
        "parameters": {name: parameter.detach() for name, parameter in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "history": vars(history) | {"points": [asdict(point) for point in history.points]},
    }
    scratch = checkpoint.with_name(checkpoint.name + ".writing")
    torch.save(state, scratch)
    os.replace(scratch, checkpoint)


@torch.no_grad()
def _resume(checkpoint: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> History | None:
    if not checkpoint.exists():
        return None
    state = torch.load(checkpoint, weights_only=True)
    for name, value in state["parameters"].items():
        parameters[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    history = state["history"]
    return History(**history | {"points": [Point(**point) for point in history["points"]]})
