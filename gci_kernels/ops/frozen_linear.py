"""A frozen linear layer through float32 products, for CPUs without a fast product of its dtype (ops/upcast.py)."""

from typing import Any

import torch
from torch import Tensor

from gci_kernels import native
from gci_kernels.impl import upcast_obstacle
from gci_kernels.ops.arguments import check_tensor, check_x, from_rows, rows, without_autocast
from gci_kernels.ops.operators import define, no_derivative
from gci_kernels.ops.transforms import differentiated_again, transformed
from gci_kernels.ops.upcast import large_product, upcast_from


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x @ W.T + b through float32 products, rounded once, and dX in the same way.

    Differentiable in x; W and b get no gradient. Only W is saved for backward. Deterministic for a given number of
    threads.

    Args:
        x: [..., in], bfloat16 or float16, on a CPU. Rows that are not contiguous are copied once.
        weight: [out, in] in x's dtype, without a gradient.
        bias: [out] in x's dtype, without a gradient, or None.

    Returns:
        [..., out], x's dtype.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, what was given and what is allowed.
    """
    check_x(x)
    if obstacle := upcast_obstacle(x.device.type, x.dtype):
        raise ValueError(f"frozen_linear cannot run here: {obstacle}")
    check_tensor("weight", weight, (None, x.shape[-1]), x, same_dtype=True)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), x, same_dtype=True)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, bias)):
        raise ValueError("weight and bias must be frozen: frozen_linear forms no gradient of them")
    if transformed():
        return torch.nn.functional.linear(x, weight, bias)
    return torch.ops.gci_kernels.frozen_linear(x, weight, bias)


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`frozen_linear` accepts x [..., in], weight and bias, and is faster than the library's product."""
    start = upcast_from(x.dtype, native.ISA) if x.device.type == "cpu" else None
    if start is None or transformed() or x.dtype != weight.dtype:
        return False
    if x.numel() < start * x.shape[-1] or torch.is_autocast_enabled("cpu"):
        return False
    return not (weight.requires_grad or bias is not None and (bias.requires_grad or bias.dtype != x.dtype))


@without_autocast
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty(x.numel() // x.shape[-1], weight.shape[0])
    return from_rows(large_product(rows(x), y, lambda columns: weight[columns].float().t(), bias), x)


@without_autocast
def _dx(dy: Tensor, weight: Tensor) -> Tensor:
    dx = dy.new_empty(dy.numel() // weight.shape[0], weight.shape[1])
    return large_product(rows(dy), dx, lambda columns: weight[:, columns].float()).view(*dy.shape[:-1], weight.shape[1])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
    """Gradients of gci_kernels::frozen_linear."""
    (weight,) = ctx.saved_tensors
    if differentiated_again(dy):
        return dy @ weight, None, None
    return torch.ops.gci_kernels.frozen_linear_dx(dy, weight) if ctx.needs_input_grad[0] else None, None, None


define(
    "frozen_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _forward, lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]), _backward, _setup_context,
)  # fmt: skip
define(
    "frozen_linear_dx(Tensor dy, Tensor weight) -> Tensor",
    _dx, lambda dy, weight: dy.new_empty(*dy.shape[:-1], weight.shape[1]),
    no_derivative("frozen_linear_dx", "use dy @ weight where one is needed"),
)  # fmt: skip
