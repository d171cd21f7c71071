"""The adapters of a decoding step, and what C++ makes of them once for all calls."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gci_kernels.native import DTYPE_CODES


class Group(NamedTuple):
    """The adapter of the tokens rows[first] to rows[first + count - 1] of a step.

    Its tensors lie on one device, without gaps, in the dtype of x or in float32, all of them in the same one.

    Attributes:
        A: [rank * max(experts, 1), in].
        B: [out, rank * max(experts, 1)].
        router: [experts, in], or None for an adapter without gates.
        top_k: how many gates count; None: all.
        qkv: [3 * rank, rank] of ALoRA, or None; in a step all groups have one or none has.
        num_heads, residual: ALoRA's.
    """

    A: Tensor
    B: Tensor
    scaling: float
    first: int
    count: int
    router: Tensor | None = None
    top_k: int | None = None
    qkv: Tensor | None = None
    num_heads: int = 1
    residual: bool = False

    @property
    def experts(self) -> int:
        return 0 if self.router is None else self.router.shape[0]

    @property
    def columns(self) -> int:
        """The values of one token between A and B, the router's logits included."""
        return self.A.shape[0] + self.experts

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.A, self.router, self.B, self.qkv) if t is not None]

    def as_tuple(self) -> tuple:
        """In the order of DecodeGroup in csrc/common/decode.h."""
        experts = self.experts
        return (
            self.A.data_ptr(), 0 if self.router is None else self.router.data_ptr(), self.B.data_ptr(),
            self.A.shape[0] // max(experts, 1), experts, self.top_k or experts, self.scaling, self.first, self.count,
        )  # fmt: skip


def native_step(
    module, groups: Sequence[Group], rows: Sequence[int], dtype: torch.dtype,
    weight: Tensor | None = None, bias: Tensor | None = None,
):  # fmt: skip
    """The extension's DecodeStep (csrc/decode_bindings.cpp). It holds addresses: the tensors have to outlive it.

    Args:
        module: the extension.
        rows: which rows of x and y the step's tokens are.
        dtype: of x and y.
        weight, bias: [out, in] and [out] or None, in `dtype`, without gaps; for the kernel that multiplies with them.
    """
    first = groups[0]
    attentions = [(g.qkv.data_ptr(), g.num_heads, g.residual) for g in groups if g.qkv is not None]
    return module.DecodeStep(
        DTYPE_CODES[dtype], DTYPE_CODES[first.A.dtype], first.A.shape[1], first.B.shape[0], list(rows),
        [group.as_tuple() for group in groups], attentions,
        tuple(0 if t is None else t.data_ptr() for t in (weight, bias)),
    )  # fmt: skip
