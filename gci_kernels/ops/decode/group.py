"""The adapters of a decoding step, and the C++ object that holds their addresses."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gci_kernels.native import DTYPE_CODES


class Group(NamedTuple):
    """One adapter of a step, for the tokens rows[first] to rows[first + count - 1].

    Its tensors are contiguous and on one device, all of them in x's dtype or all in float32.

    Attributes:
        A: [rank * max(experts, 1), in].
        B: [out, rank * max(experts, 1)].
        scaling: the factor of the adapter's update.
        first, count: its tokens, as indices of the step's rows.
        router: [experts, in], or None for an adapter without gates.
        top_k: how many gates are kept; None: all.
        qkv: [3 * rank, rank] of ALoRA, or None; either all groups of a step have one or none has.
        num_heads, residual: ALoRA's.
    """

    A: Tensor
    B: Tensor
    scaling: float
    first: int
    count: int  # type: ignore[assignment]  # the field hides tuple.count, which nobody calls
    router: Tensor | None = None
    top_k: int | None = None
    qkv: Tensor | None = None
    num_heads: int = 1
    residual: bool = False

    @property
    def experts(self) -> int:
        """The number of experts, 0 for an adapter without gates."""
        return 0 if self.router is None else self.router.shape[0]

    @property
    def columns(self) -> int:
        """How many numbers a token has between A and B, the router's logits included."""
        return self.A.shape[0] + self.experts

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the adapter."""
        return [t for t in (self.A, self.router, self.B, self.qkv) if t is not None]

    def as_tuple(self) -> tuple:
        """Addresses, sizes and settings in the order of DecodeGroup in csrc/common/decode.h."""
        experts = self.experts
        return (
            self.A.data_ptr(), 0 if self.router is None else self.router.data_ptr(), self.B.data_ptr(),
            self.A.shape[0] // max(experts, 1), experts, self.top_k or experts, self.scaling, self.first, self.count,
        )  # fmt: skip


def native_step(
    module: Any, groups: Sequence[Group], rows: Sequence[int], dtype: torch.dtype,
    weight: Tensor | None = None, bias: Tensor | None = None,
) -> Any:  # fmt: skip
    """The extension's DecodeStep (csrc/decode_bindings.cpp). It holds addresses only: the tensors must outlive it.

    Args:
        module: the extension.
        groups: the adapters.
        rows: which rows of x and y the step's tokens are.
        dtype: of x and y.
        weight, bias: [out, in] and [out] or None, in `dtype`, contiguous; for a kernel that computes the base product.

    Raises:
        ValueError: there are more tokens than a step may have, or only some of the groups have a qkv.
    """
    first = groups[0]
    attentions = [(g.qkv.data_ptr(), g.num_heads, g.residual) for g in groups if g.qkv is not None]
    return module.DecodeStep(
        DTYPE_CODES[dtype], DTYPE_CODES[first.A.dtype], first.A.shape[1], first.B.shape[0], list(rows),
        [group.as_tuple() for group in groups], attentions,
        tuple(0 if t is None else t.data_ptr() for t in (weight, bias)),
    )  # fmt: skip
