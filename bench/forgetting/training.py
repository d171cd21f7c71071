"""Train one adapted model until it knows the domain as well as all others do, and write down what that cost."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    """How long a run lasts and how often it is looked at.

    Args:
        batch: examples in a step.
        every: steps between two looks.
        steps: the most there are; the examples of a run are drawn for as many.
        target: the held-out domain loss at which a run ends.
    """

    batch: int
    every: int
    steps: int
    target: float


@dataclass
class History:
    """What is known of a run so far; all of it is kept, so that a killed run goes on where it was looked at last."""

    points: list[Point] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    memory: int | None = None

    @property
    def done(self) -> int:
        return len(self.losses)


def train(
    model: nn.Module,
    examples: Sequence[Example],
    schedule: Schedule,
    start: Point,
    look: Callable[[int, int], Point],
    kept: Path,
    *,
    learning_rate: float,
    pad: int,
    seed: int,
    after: Callable[[History], None] = lambda history: None,
) -> History:
    """Train what `model` has to train, until a look finds the domain loss at its target or the steps are used up.

    AdamW with a constant rate after a few steps of warm-up, no decay, the gradient's norm at most 1. The loss is taken
    on the answers, mean over tokens, with LoRAMoE's balance constraint where the adapter has it. Examples come in the
    order of `seed`, again in another one when they are used up.

    Args:
        start: what the untouched model is like, and the adapted one before its first step.
        look: from steps and tokens done to what the model, in evaluation mode, is like.
        kept: the file that holds a run between two looks; removed by the caller when the run's result is safe.
        after: called after every look.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.0)
    history = _resume(kept, parameters, optimizer) or History(points=[start])
    batches = batches_of(examples, schedule.batch, schedule.steps, seed)
    while history.done < schedule.steps and history.points[-1].domain_loss > schedule.target:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (history.done + 1) / WARMUP)
        batch = collate([examples[row] for row in batches[history.done]], pad)
        model.train()
        step = partial(_step, model, batch, optimizer, history)
        if history.done == 1:  # the optimizer's moments are there by now, and are no part of the step
            history.memory = peak_memory(step, torch.device("cpu"))
        else:
            step()
        if history.done % schedule.every == 0 or history.done == schedule.steps:
            model.eval()
            history.points.append(look(history.done, sum(history.tokens)))
            _keep(kept, parameters, optimizer, history)
            after(history)
    return history


def _step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, history: History) -> None:
    start = time.perf_counter()
    more = {"task_types": batch.task_types} if _balanced(model) else {}
    logits, output = batch.logits(model, **more)
    loss = batch.losses(logits).mean()
    (loss + output["balance_loss"] if more else loss).backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    history.seconds.append(time.perf_counter() - start)
    history.losses.append(loss.item())
    history.tokens.append(batch.tokens)


def _balanced(model: nn.Module) -> bool:
    config = getattr(model, "peft_config", {}).get("default")
    return getattr(config, "balance_weight", 0.0) > 0


def batches_of(examples: Sequence[Example], size: int, steps: int, seed: int) -> list[list[int]]:
    """Indices of the examples of each of `steps` steps: one shuffled pass after another.

    Of every four batches in a row the examples are dealt by length, and the four are taken in any order: half as much
    padding as in plainly shuffled ones.
    """
    random, order = Random(seed), []
    while len(order) < size * steps:
        one_pass = list(range(len(examples)))
        random.shuffle(one_pass)
        order += one_pass
    batches: list[list[int]] = []
    for first in range(0, size * steps, 4 * size):
        window = sorted(order[first : first + 4 * size], key=lambda index: len(examples[index].ids))
        dealt = [window[start : start + size] for start in range(0, len(window), size)]
        batches += random.sample(dealt, len(dealt))
    return batches[:steps]


def _keep(kept: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, history: History) -> None:
    state = {
        "parameters": {name: parameter.detach() for name, parameter in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "history": vars(history) | {"points": [point.json() for point in history.points]},
    }
    scratch = kept.with_name(kept.name + ".writing")
    torch.save(state, scratch)
    os.replace(scratch, kept)


@torch.no_grad()
def _resume(kept: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> History | None:
    if not kept.exists():
        return None
    state = torch.load(kept, weights_only=True)
    for name, value in state["parameters"].items():
        parameters[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    history = state["history"]
    return History(**history | {"points": [Point(**point) for point in history["points"]]})
