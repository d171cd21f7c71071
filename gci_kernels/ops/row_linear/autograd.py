"""Forward and backward of every form: a torch.autograd.Function, and the same as registered operators.

Saved for backward: x, and the weights, which are in memory anyway. W's own gradient is never formed.

Eager mode calls the Function, which costs less than an operator's dispatch. The operators gci_kernels::row_linear and
::row_linear_backward are for torch.compile, fake tensors and dispatch modes.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gci_kernels.impl import implementation
from gci_kernels.ops.arguments import from_rows, rows, without_autocast
from gci_kernels.ops.operators import define, no_derivative
from gci_kernels.ops.row_linear import reference
from gci_kernels.ops.row_linear.plan import padded
from gci_kernels.ops.transforms import PLAIN, differentiated_again, dispatch_mode_depth, plain_gradients
from gci_kernels.ops.upcast import reduced


def _products(form: str) -> ModuleType:
    """The implementation that has `form`: upcast.py and triton.py have one each, aten.py the others."""
    return implementation("row_linear", form if form in ("upcast", "triton") else "aten")


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, positions: Tensor, active_bias: Tensor | None,
    form: str,
) -> Tensor:  # fmt: skip
    """:func:`row_linear` outside autograd and autocast."""
    if active_bias is not None:
        bias = reference.merged_bias(bias, active_bias, positions)
    return from_rows(_products(form).forward(rows(x), weight, bias, active, positions, form), x)


@without_autocast
def _row_linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, active: Tensor, positions: Tensor, form: str, needs: list[bool]
) -> list[Tensor]:
    """The needed ones of [dx, dactive, dactive_bias], the last two in x's dtype."""
    needs_x, needs_active, needs_bias = needs
    dy, gradients = rows(dy), []
    # One copy for all uses: the columns are not contiguous, so reading them costs as much as reading all of dy.
    columns, k = _columns(dy, positions), positions.shape[0]
    dy_active = columns[:, :k]
    if needs_x:
        gradients.append(_products(form).dx(dy, weight, active, positions, dy_active, form).view(x.shape))
    if needs_active:
        x = rows(x)
        gradients.append(reduced(dy_active, x).to(x.dtype) if form == "upcast" else torch.mm(columns.t(), x)[:k])
    if needs_bias:
        gradients.append(dy_active.sum(0))
    return gradients


def _columns(dy: Tensor, positions: Tensor) -> Tensor:
    """dy's columns at `positions` [k], [tokens, padded(k)]; those behind the k-th repeat the first, to no use."""
    more = padded(positions.shape[0], dy.device.type) - positions.shape[0]
    return dy.index_select(1, torch.cat((positions, positions[:1].expand(more))) if more else positions)


def _row_linear_backward_fake(dy: Tensor, x: Tensor, weight: Tensor, active: Tensor, *others: Any) -> list[Tensor]:
    shapes = (x.shape, active.shape, active.shape[:1])
    return [x.new_empty(shape) for shape, needed in zip(shapes, others[-1], strict=True) if needed]


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, active, positions, active_bias, ctx.form = inputs
    ctx.dtypes = active.dtype, None if active_bias is None else active_bias.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, active, positions)


def _backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of gci_kernels::row_linear, formed only where something needs them."""
    if dy is None:
        return (None,) * 7
    needs = [ctx.needs_input_grad[index] for index in (0, 3, 5)]
    if differentiated_again(dy):
        dx, dactive, dactive_bias = _formula_backward(dy, *ctx.saved_tensors, needs)
    else:
        op = _row_linear_backward if _is_eager(dy) else torch.ops.gci_kernels.row_linear_backward
        gradients = iter(op(dy, *ctx.saved_tensors, ctx.form, needs))
        dx, dactive, dactive_bias = (next(gradients) if needed else None for needed in needs)
    dactive, dactive_bias = (
        None if t is None else t.to(dtype) for t, dtype in zip((dactive, dactive_bias), ctx.dtypes, strict=True)
    )
    return dx, None, None, dactive, None, dactive_bias, None


@without_autocast
def _formula_backward(
    dy: Tensor, x: Tensor, weight: Tensor, active: Tensor, positions: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """The needed ones of [dx, dactive, dactive_bias], in PyTorch's own operations."""
    tensors = {"x": x, "active_weight": active}

    def formula(inputs: dict[str, Tensor]) -> tuple[Tensor]:
        x, active = (tensors | inputs).values()
        return (reference.loki_linear(x, weight, None, active, positions, None),)

    wanted = {name: tensor for (name, tensor), needed in zip(tensors.items(), needs, strict=False) if needed}
    found = plain_gradients(formula, wanted, (dy,))
    dactive_bias = dy.reshape(-1, dy.shape[-1]).index_select(1, positions).sum(0) if needs[2] else None
    return [found.get("x"), found.get("active_weight"), dactive_bias]


define(
    "row_linear(Tensor x, Tensor weight, Tensor? bias, Tensor active, Tensor positions, Tensor? active_bias, str form) "
    "-> Tensor",
    without_autocast(forward), lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]),
    _backward, _setup_context,
)  # fmt: skip
define(
    "row_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor active, Tensor positions, str form, bool[3] needs) "
    "-> Tensor[]",
    _row_linear_backward, _row_linear_backward_fake, no_derivative("row_linear_backward"),
)  # fmt: skip


class _RowLinear(torch.autograd.Function):
    """The operator gci_kernels::row_linear for eager mode."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """See :func:`forward`."""
        y = forward(*args)
        _setup_context(ctx, args, y)
        return y

    backward = staticmethod(_backward)


# Without torch.autograd.Function.apply's search for tensors of torch.func, under which the formula runs instead.
_apply = super(torch.autograd.Function, _RowLinear).apply
_apply_without_autocast = without_autocast(_apply)


def _is_eager(t: Tensor) -> bool:
    """Whether nothing has to see an operator: no compiler, no dispatch mode, no subclass such as a fake tensor."""
    return not is_dynamo_compiling() and dispatch_mode_depth() == 0 and type(t) in PLAIN


def row_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, positions: Tensor, active_bias: Tensor | None,
    form: str,
) -> Tensor:  # fmt: skip
    """x @ W'.T + b', [..., out] in x's dtype; differentiable in x, active and active_bias. Nothing is checked.

    Args:
        x: [..., in], any floating dtype and device.
        weight: [out, in] in x's dtype; W, or W' with the form "kept".
        bias: [out] in x's dtype, or None.
        active: [k, in], any floating dtype; used in x's.
        positions: [k] int64, distinct: the rows of W' that `active` holds.
        active_bias: [k], any floating dtype, used in x's; or None. It needs a bias.
        form: one of :data:`~gci_kernels.ops.row_linear.plan.FORMS`.
    """
    if not _is_eager(x):
        return torch.ops.gci_kernels.row_linear.default(x, weight, bias, active, positions, active_bias, form)
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    apply = _apply_without_autocast if autocast else _apply
    return apply(x, weight, bias, active, positions, active_bias, form)
