"""The checks of the bottleneck's Triton kernels, each against the library's form of its stage in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from gci_kernels.hardware import Comparison, Shape
from gci_kernels.hardware.self_check import compare, drawing
from gci_kernels.impl import implementation
from gci_kernels.ops.bottleneck import stages
from gci_kernels.ops.bottleneck.philox import Dropout
from gci_kernels.ops.bottleneck.plan import Plan

#: Every stage by the library, and every stage in Triton.
ATEN, TRITON = (Plan(*[impl] * len(Plan._fields)) for impl in ("aten", "triton"))
_SEED = 2**61 + 12345


Stage = Callable[[Plan, dict[str, Tensor], Dropout | None], dict[str, Tensor]]


def make_operands(
    draw: Callable[..., Tensor], shape: Shape, dtype: torch.dtype, adapter_dtype: torch.dtype
) -> dict[str, Tensor]:
    """What the stages of one adapted layer read; `stack` is A and the router."""
    std, hidden = shape.depth**-0.5, shape.rank + shape.experts
    return {
        "x": draw(shape.tokens, shape.depth, dtype), "dy": draw(shape.tokens, shape.width, dtype),
        "weight": draw(shape.width, shape.depth, dtype, std), "bias": draw(1, shape.width, dtype)[0],
        "stack": draw(hidden, shape.depth, adapter_dtype, std),
        "B": draw(shape.width, shape.rank, adapter_dtype, shape.rank**-0.5),
        "u": draw(shape.tokens, shape.rank, dtype), "dprojected": draw(shape.tokens, hidden, dtype),
    }  # fmt: skip


def check(stage: Stage, dropout: bool, shape: Shape, dtype: torch.dtype, device: torch.device) -> Comparison:
    """Compare `stage`, one of the functions below, by Triton and by the library, in a layer with dropout or without.

    With p = 0.5 values are doubled, which rounds nothing, whenever a stage rounds.
    """
    # The adapter in float32, PEFT's default: the stages round it.
    inputs = make_operands(drawing(shape, device), shape, dtype, torch.float32)
    drop = Dropout(0.5, _SEED, shape.rank) if dropout else None

    def outputs(plan: Plan, t: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name + ", dropout" * dropout: made for name, made in stage(plan, t, drop).items()}

    return compare(outputs, TRITON, ATEN, inputs, rounded_to=dtype)


def project(plan: Plan, t: dict[str, Tensor], drop: Dropout | None) -> dict[str, Tensor]:
    """In forward, with dropout also without a router, and of dY."""
    made = {
        "projected": stages.project(plan, t["x"], t["stack"].t(), drop),
        "du": stages.project(plan, t["dy"], t["B"]),
    }
    return made if drop is None else made | {"h": stages.project(plan, t["x"], t["stack"][: drop.columns].t(), drop)}


def expand(plan: Plan, t: dict[str, Tensor], drop: Dropout | None) -> dict[str, Tensor]:
    """In forward, with and without the base product, and dX, the only one that dropout changes."""
    return {
        "y": stages.expand(plan, t["u"], t["B"].t(), t["x"], t["weight"].t(), t["bias"]),
        "update": stages.expand(plan, t["u"], t["B"].t(), t["x"], None, None),
        "dx": stages.expand(plan, t["dprojected"], t["stack"], t["dy"], t["weight"], None, drop),
    }


def reduce(plan: Plan, t: dict[str, Tensor], drop: Dropout | None) -> dict[str, Tensor]:
    """dA, the only one that dropout changes, and dB; and dU and dB from one reading of dY, where Triton takes one."""
    made = {"dA": stages.reduce(plan, t["dprojected"], t["x"], drop), "dB": stages.reduce(plan, t["u"], t["dy"])}
    if plan is ATEN:
        du, dB = stages.project(plan, t["dy"], t["B"]), made["dB"]
    elif stages.one_reading(plan, t["dy"], t["u"].shape[1]):
        du, dB = stages.project_reduce(plan, t["dy"], t["B"], t["u"])
    else:
        return made
    return made | {"du, one reading": du, "dB, one reading": dB}


def dropout(plan: Plan, t: dict[str, Tensor], drop: Dropout | None) -> dict[str, Tensor]:
    """A copy, in place, and the mask."""
    module, x = implementation("bottleneck", plan.dropout), t["x"]
    dropped, in_place = module.dropout(x, 0.3, _SEED), module.dropout_(x.clone(), 0.3, _SEED)
    return {"dropped": dropped, "dropped in place": in_place, "kept": (dropped != 0).float()}
