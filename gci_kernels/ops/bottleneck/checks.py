"""The checks of the bottleneck's Triton kernels, each against the library's form of its stage in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gci_kernels.hardware import Comparison, Shape
from gci_kernels.hardware.self_check import drawing
from gci_kernels.impl import implementation
from gci_kernels.ops.bottleneck import stages
from gci_kernels.ops.bottleneck.philox import Dropout
from gci_kernels.ops.bottleneck.plan import Plan

#: Every stage by the library, and every stage in Triton.
ATEN, TRITON = (Plan(*[impl] * len(Plan._fields)) for impl in ("aten", "triton"))
_SEED = 2**61 + 12345


@dataclass(frozen=True)
class _Inputs:
    """What the stages of one adapted layer read; every dtype but those of `stack` and B is that of x."""

    x: Tensor  # [tokens, depth]
    dy: Tensor  # [tokens, width]
    weight: Tensor  # [width, depth]
    bias: Tensor  # [width]
    stack: Tensor  # [rank + experts, depth], A and the router; float32 like B: PEFT's default, rounded by the stages
    B: Tensor  # [width, rank]
    u: Tensor  # [tokens, rank]
    dprojected: Tensor  # [tokens, rank + experts]

    @property
    def drop(self) -> Dropout:
        """Of A's rows. With p = 0.5 values are doubled, which rounds nothing, whenever a stage rounds."""
        return Dropout(0.5, _SEED, self.u.shape[1])

    def double(self) -> "_Inputs":
        """The same numbers, as the stages round them, in float64."""
        return _Inputs(**{name: t.to(self.x.dtype).double() for name, t in vars(self).items()})


Stage = Callable[[_Inputs, Plan], dict[str, Tensor]]


def check(stage: Stage, shape: Shape, dtype: torch.dtype, device: torch.device) -> Comparison:
    """Compare `stage`, one of the functions below, by Triton and by the library."""
    draw, hidden, std = drawing(shape, device), shape.rank + shape.experts, shape.depth**-0.5
    inputs = _Inputs(
        x=draw(shape.tokens, shape.depth, dtype),
        dy=draw(shape.tokens, shape.width, dtype),
        weight=draw(shape.width, shape.depth, dtype, std),
        bias=draw(1, shape.width, dtype)[0],
        stack=draw(hidden, shape.depth, torch.float32, std),
        B=draw(shape.width, shape.rank, torch.float32, shape.rank**-0.5),
        u=draw(shape.tokens, shape.rank, dtype),
        dprojected=draw(shape.tokens, hidden, dtype),
    )
    plain, truth = stage(inputs, ATEN), stage(inputs.double(), ATEN)
    return Comparison(lambda: stage(inputs, TRITON), plain, truth)


def project(t: _Inputs, plan: Plan) -> dict[str, Tensor]:
    """In forward, with and without router and dropout, and of dY."""
    return {
        "projected": stages.project(plan, t.x, t.stack.t()),
        "projected, dropout": stages.project(plan, t.x, t.stack.t(), t.drop),
        "h, dropout": stages.project(plan, t.x, t.stack[: t.u.shape[1]].t(), t.drop),
        "du": stages.project(plan, t.dy, t.B),
    }


def expand(t: _Inputs, plan: Plan) -> dict[str, Tensor]:
    """In forward, with and without the base product, and dX with and without dropout."""
    return {
        "y": stages.expand(plan, t.u, t.B.t(), t.x, t.weight.t(), t.bias),
        "update": stages.expand(plan, t.u, t.B.t(), t.x, None, None),
        "dx": stages.expand(plan, t.dprojected, t.stack, t.dy, t.weight, None),
        "dx, dropout": stages.expand(plan, t.dprojected, t.stack, t.dy, t.weight, None, t.drop),
    }


def reduce(t: _Inputs, plan: Plan) -> dict[str, Tensor]:
    """dA with and without dropout and dB; and dU and dB from one reading of dY."""
    rank = t.u.shape[1]
    return {
        "dA": stages.reduce(plan, t.dprojected, t.x),
        "dA, dropout": stages.reduce(plan, t.dprojected, t.x, t.drop),
        "dB": stages.reduce(plan, t.u, t.dy),
    } | dict(zip(("du, one reading", "dB, one reading"), _one_reading(t, plan, rank), strict=False))


def _one_reading(t: _Inputs, plan: Plan, rank: int) -> tuple[Tensor, ...]:
    """Nothing from Triton where it would not read dY once."""
    if plan is not TRITON:
        return stages.project(plan, t.dy, t.B), stages.reduce(plan, t.u, t.dy)
    return stages.project_reduce(plan, t.dy, t.B, t.u) if stages.one_reading(plan, t.dy, rank) else ()


def dropout(t: _Inputs, plan: Plan) -> dict[str, Tensor]:
    """A copy, in place, and the mask."""
    module = implementation("bottleneck", plan.dropout)
    dropped, in_place = module.dropout(t.x, 0.3, _SEED), module.dropout_(t.x.clone(), 0.3, _SEED)
    return {"dropped": dropped, "dropped in place": in_place, "kept": (dropped != 0).float()}
