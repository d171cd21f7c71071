"""A decoding step in a graph of torch.compile."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gci_kernels.ops.decode.group import Group


class GraphStep:
    """Stands for a step while torch.compile traces: calls the operator that finds the step when the graph runs.

    Args:
        weight, bias: [out, in] and [out] or None; weight None: y comes with the base product.
        groups: the adapters and their tokens.
        rows: which rows of x the groups' tokens are; None: all of them belong to the only group.
    """

    def __init__(
        self, weight: Tensor | None, bias: Tensor | None, groups: Sequence[Group], rows: Sequence[int] | None
    ) -> None:
        self.base, self.groups = (weight, bias), groups
        # Without rows the number of tokens stays open, so that one graph serves any number.
        self.rows, self.counts = ([], []) if rows is None else (list(rows), [g.count for g in groups])

    def run(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """y [..., out] for x [..., in], a new tensor; the y that is given, [..., out], is not written to."""
        groups = self.groups
        return torch.ops.gci_kernels.decode(
            x, *self.base, y, [g.A for g in groups], [g.B for g in groups], [g.router for g in groups],
            [g.scaling for g in groups], [g.top_k or g.experts for g in groups], self.rows, self.counts,
        )  # fmt: skip

    def attend(self, x: Tensor, y: Tensor | None, kv: Tensor, past: Tensor, segments: Tensor | None) -> Tensor:
        """:meth:`run` with attention; kv, past and segments as native.Step.attend and cuda.Step.attend take them."""
        groups = self.groups
        return torch.ops.gci_kernels.decode_attend(
            x, *self.base, y, [g.A for g in groups], [g.B for g in groups], [g.qkv for g in groups], kv, past, segments,
            [g.scaling for g in groups], [g.num_heads for g in groups], [g.residual for g in groups],
            self.rows, self.counts,
        )  # fmt: skip
