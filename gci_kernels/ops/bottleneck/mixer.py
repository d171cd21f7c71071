"""The record of a mixer: what stands between `project` and `expand` in a bottleneck adapter.

y = base(x) + scaling * mix(x @ A.T) @ B.T. An adapter of this family differs from LoRA in `mix` alone. One function,
the formula, defines it; all else of a record is optional: a backward by hand, kernels, a form for decoding steps.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Call(NamedTuple):
    """One call of a mixer, beside its tensors.

    Attributes:
        settings: the mixer's own integers, in an order that it defines.
        scaling: what u is multiplied by.
        lead: x's shape without its last dimension.
        rank: A's rows.
        dtype: of x, and of u.
        sum_dtype: of `projected`: float32 where our own products of 16-bit tensors left their sums unrounded.
        impl: which of the mixer's implementations runs.
        segments: int32 [batch, keys] or None; see :class:`gci_kernels.ops.Sequence`.
        past: [batch, past, any] or None: what earlier calls returned as output, joined.
    """

    settings: tuple[int, ...]
    scaling: float
    lead: tuple[int, ...]
    rank: int
    dtype: torch.dtype
    sum_dtype: torch.dtype
    impl: str
    segments: Tensor | None = None
    past: Tensor | None = None


class Kept(NamedTuple):
    """What backward needs of a mixer's forward, beside its weights; an empty tensor stands for nothing."""

    projected: Tensor
    mixed: Tensor
    stats: Tensor


class Output(enum.Enum):
    """What a mixer returns beside u."""

    NONE = "nothing"
    CONSTANT = "a tensor without a gradient"
    DIFFERENTIABLE = "a tensor with a gradient"


#: formula(h [*lead, rank], weights, call) -> u [*lead, columns of B], unscaled, or (u, output) where the mixer declares
#: an output. Plain PyTorch in any floating dtype, differentiable. `weights` are x @ weights.T [*lead, n] where they
#: join `project`, else the weights themselves, in h's dtype; None where the mixer has none.
Formula = Callable[[Tensor, Any, Call], Any]
Shape = tuple[tuple[int, ...], torch.dtype]


class Stages(Protocol):
    """A mixer's forward and backward, on rows: by hand, or made of its formula (by_autograd.py)."""

    def forward(self, projected: Tensor, weights: Any, call: Call) -> tuple[Tensor, Kept, Tensor]:
        """projected [tokens, rank, and the weights' rows where they join] -> u [tokens, columns of B], kept, output.

        u is scaled, in x's dtype. Where there is no output, an empty tensor stands for it.
        """

    def recompute(self, weights: Any, kept: Kept, call: Call) -> Tensor:
        """u once more, in backward."""

    def backward(
        self, du: Tensor, doutput: Tensor | None, weights: Any, kept: Kept, call: Call
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """du [tokens, columns of B] -> dprojected in x's dtype, the weights' gradient (None where they join), u."""

    def shapes(self, weights: Any, call: Call) -> list[Shape]:
        """Shape and dtype of the three tensors of Kept, and of the output."""


@dataclass(frozen=True)
class Mixer:
    """An adapter of the bottleneck family.

    Attributes:
        name: unique among the registered ones.
        formula: see :data:`Formula`; it is the reference, and what second derivatives are of.
        joins: the weights are [n, in] and are projected beside A in one product, as a router's.
        output: what the formula returns beside u.
        columns: of B, from A's rows and the weights' rows (0 without weights).
        check: raises ValueError or TypeError where (x, A, weights, settings) do not fit; None: nothing to check.
        stages: forward and backward by hand; None: made of the formula, with autograd in backward.
        implementations: of "native" and "triton" those that `stages` has; the library's form is always there.
        kernel: the GPU kernel of `stages` in gci_kernels.hardware.KERNELS, which has to have proved itself.
        decode: (weights, settings) -> the fields of gci_kernels.ops.decode.Group after `count`; None: no kernel for few
            tokens.
        merge: (A, weights, settings) -> what B is multiplied with [columns of B, in] where the update does not depend
            on x; None: it cannot be merged into a weight.
    """

    name: str
    formula: Formula
    joins: bool = False
    output: Output = Output.NONE
    columns: Callable[[int, int], int] = lambda rank, rows: rank
    check: Callable[[Tensor, Tensor, Tensor | None, tuple[int, ...]], None] | None = None
    stages: Stages | None = None
    implementations: frozenset[str] = frozenset()
    kernel: str | None = None
    decode: Callable[[Tensor | None, tuple[int, ...]], tuple[Any, ...]] | None = None
    merge: Callable[[Tensor, Tensor | None, tuple[int, ...]], Tensor] | None = None
