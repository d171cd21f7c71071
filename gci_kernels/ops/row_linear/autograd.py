"""The registered operators gci_kernels::row_linear and ::row_linear_backward, and the derivative that joins them.

Saved for backward: x, and the weights, which are alive anyway. W's own gradient is never formed.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from gci_kernels.ops.arguments import from_rows, rows, without_autocast
from gci_kernels.ops.row_linear import reference
from gci_kernels.ops.transforms import differentiated_again, plain_gradients
from gci_kernels.ops.upcast import reduced

_library = torch.library.Library("gci_kernels", "FRAGMENT")
_library.define(
    "row_linear(Tensor x, Tensor weight, Tensor? bias, Tensor active, Tensor positions, Tensor? active_bias, str form) "
    "-> Tensor"
)
_library.define(
    "row_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor active, Tensor positions, str form, bool[3] needs) "
    "-> Tensor[]"
)


@functools.cache
def _module(form: str) -> ModuleType:
    """triton.py and upcast.py for the forms of these names, else aten.py; loaded when it is first named."""
    return importlib.import_module(f"gci_kernels.ops.row_linear.{form if form in ('triton', 'upcast') else 'aten'}")


@without_autocast
def _row_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, positions: Tensor, active_bias: Tensor | None,
    form: str,
) -> Tensor:  # fmt: skip
    if active_bias is not None:
        bias = bias.index_copy(0, positions, active_bias.to(bias.dtype))
    y = _module(form).forward(rows(x), weight, bias, active, positions, form)
    return from_rows(y, x)


def _row_linear_fake(x, weight, bias, active, positions, active_bias, form):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@without_autocast
def _row_linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, active: Tensor, positions: Tensor, form: str, needs: list[bool]
) -> list[Tensor]:
    """The needed ones of [dx, dactive, dactive_bias], the last two in x's dtype."""
    needs_x, needs_active, needs_bias = needs
    dy, gradients = rows(dy), []
    # Once, for every use: the columns lie apart, and reading them that way costs as much as reading all of dy.
    chosen = dy.index_select(1, positions)
    if needs_x:
        gradients.append(_module(form).dx(dy, weight, active, positions, chosen, form).view(x.shape))
    if needs_active:
        gradients.append(_dactive(chosen, rows(x), form))
    if needs_bias:
        gradients.append(chosen.sum(0))
    return gradients


def _dactive(chosen: Tensor, x: Tensor, form: str) -> Tensor:
    """chosen.T @ x [k, in], in x's dtype."""
    return reduced(chosen, x).to(x.dtype) if form == "upcast" else torch.mm(chosen.t(), x)


def _row_linear_backward_fake(dy, x, weight, active, positions, form, needs):
    shapes = (x.shape, active.shape, active.shape[:1])
    return [x.new_empty(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, active, positions, active_bias, ctx.form = inputs
    ctx.dtypes = active.dtype, None if active_bias is None else active_bias.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, active, positions)


def _backward(ctx, dy):
    """Gradients of gci_kernels::row_linear, formed only where something needs them."""
    needs = [ctx.needs_input_grad[index] for index in (0, 3, 5)]
    if dy is None:
        return (None,) * 7
    if differentiated_again(dy):
        dx, dactive, dactive_bias = _formula_backward(dy, *ctx.saved_tensors, needs)
        return dx, None, None, dactive, None, None if dactive_bias is None else dactive_bias.to(ctx.dtypes[1]), None
    gradients = iter(torch.ops.gci_kernels.row_linear_backward(dy, *ctx.saved_tensors, ctx.form, needs))
    dx, dactive, dactive_bias = (next(gradients) if needed else None for needed in needs)
    dactive = None if dactive is None else dactive.to(ctx.dtypes[0])
    dactive_bias = None if dactive_bias is None else dactive_bias.to(ctx.dtypes[1])
    return dx, None, None, dactive, None, dactive_bias, None


@without_autocast
def _formula_backward(
    dy: Tensor, x: Tensor, weight: Tensor, active: Tensor, positions: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """The needed ones of [dx, dactive, dactive_bias], in PyTorch's own operations."""

    def formula(*chosen: Tensor) -> tuple[Tensor]:
        given = iter(chosen)
        inputs = [next(given) if needed else t for t, needed in zip((x, active), needs[:2], strict=True)]
        return (reference.loki_linear(inputs[0], weight, None, inputs[1], positions, None),)

    wanted = [t for t, needed in zip((x, active), needs[:2], strict=True) if needed]
    gradients = iter(plain_gradients(formula, wanted, (dy,)) if wanted else ())
    dbias = dy.reshape(-1, dy.shape[-1]).index_select(1, positions).sum(0) if needs[2] else None
    return [*(next(gradients) if needed else None for needed in needs[:2]), dbias]


def _no_double_backward(ctx, *gradients):
    raise RuntimeError("gci_kernels::row_linear_backward has no derivative; use impl='reference' where one is needed")


_library.impl("row_linear", _row_linear, "CompositeExplicitAutograd")
_library.impl("row_linear_backward", _row_linear_backward, "CompositeExplicitAutograd")
torch.library.register_fake("gci_kernels::row_linear", _row_linear_fake, lib=_library)
torch.library.register_fake("gci_kernels::row_linear_backward", _row_linear_backward_fake, lib=_library)
torch.library.register_autograd("gci_kernels::row_linear", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("gci_kernels::row_linear_backward", _no_double_backward, lib=_library)
row_linear = torch.ops.gci_kernels.row_linear.default
