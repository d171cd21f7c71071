"""The registered operators gci_kernels::low_rank_attention and ::low_rank_attention_backward.

Saved for backward: q, k, v, o and lse, none of them written to; the probabilities are recomputed from lse.
"""

from typing import Any

import torch
from torch import Tensor

from gci_kernels.impl import implementation
from gci_kernels.ops.arguments import without_autocast
from gci_kernels.ops.attention import reference
from gci_kernels.ops.operators import define, no_derivative
from gci_kernels.ops.transforms import differentiated_again, plain_gradients


@without_autocast
def _forward(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, segments: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    return implementation("attention", impl).forward(q, k, v, num_heads, segments)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, num_heads: int, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[0], num_heads, q.shape[1], dtype=lse_dtype)


@without_autocast
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, num_heads: int, segments: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return implementation("attention", impl).backward(do, q, k, v, o, lse, num_heads, segments)


def _backward_fake(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.num_heads, segments, ctx.impl = inputs
    o, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, o, lse, segments)


def _derivative(ctx: Any, do: Tensor, dlse: None) -> tuple[Tensor | None, ...]:
    """Gradients of gci_kernels::low_rank_attention."""
    q, k, v, o, lse, segments = ctx.saved_tensors
    if differentiated_again(do):
        return *_formula_backward(do, q, k, v, ctx.num_heads, segments), None, None, None
    dq, dk, dv = torch.ops.gci_kernels.low_rank_attention_backward(
        do, q, k, v, o, lse, ctx.num_heads, segments, ctx.impl
    )
    return dq, dk, dv, None, None, None


@without_autocast
def _formula_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, num_heads: int, segments: Tensor | None
) -> tuple[Tensor, ...]:
    """dq, dk and dv in PyTorch's own operations."""
    return plain_gradients(lambda q, k, v: reference.forward(q, k, v, num_heads, segments)[:1], (q, k, v), (do,))


define(
    "low_rank_attention(Tensor q, Tensor k, Tensor v, int num_heads, Tensor? segments, str impl) "
    "-> (Tensor o, Tensor lse)",
    _forward, _forward_fake, _derivative, _setup_context,
)  # fmt: skip
define(
    "low_rank_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, int num_heads, "
    "Tensor? segments, str impl) -> (Tensor dq, Tensor dk, Tensor dv)",
    _backward, _backward_fake, no_derivative("low_rank_attention_backward"),
)  # fmt: skip
attention = torch.ops.gci_kernels.low_rank_attention.default
