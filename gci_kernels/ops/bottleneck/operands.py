"""The records that the parts of the op hand each other."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gci_kernels.ops.bottleneck.mixer import Call
from gci_kernels.ops.bottleneck.philox import Dropout
from gci_kernels.ops.bottleneck.plan import Plan


class Operands(NamedTuple):
    """The tensors of one adapted layer's call.

    Attributes:
        x: [..., in], floating point.
        weight, bias: the base layer's [out, in] and [out] in x's dtype, or None; without a weight y is the update.
        A: [rank, in]; B: [out, columns]; any floating dtype, used in x's.
        weights: the mixer's, or None.
        segments, past: what the mixer is told of the sequence, or None.
        seed: of dropout, or its mask, as mask.py makes them; None: there is none.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    A: Tensor
    B: Tensor
    weights: Any = None
    segments: Tensor | None = None
    past: Tensor | None = None
    seed: Tensor | None = None


class Settings(NamedTuple):
    """What the call is beside tensors.

    Attributes:
        mixer: its name.
        numbers: the mixer's own settings.
        plan: which implementation runs each stage.
    """

    mixer: str
    numbers: tuple[int, ...]
    scaling: float
    dropout_p: float
    plan: Plan


def make_call(operands: Operands, settings: Settings, sum_dtype: torch.dtype, impl: str) -> Call:
    """What the mixer is told."""
    x, A, segments, past = operands.x, operands.A, operands.segments, operands.past
    lead = tuple(x.shape[:-1])
    return Call(settings.numbers, settings.scaling, lead, A.shape[0], x.dtype, sum_dtype, impl, segments, past)


def dropout_of(operands: Operands, settings: Settings) -> Dropout | None:
    """Dropout of what A's rows see of x; weights that join see x itself."""
    if operands.seed is None:
        return None
    return Dropout(settings.dropout_p, operands.seed, operands.A.shape[0])
