"""Forward and backward of every mixer and plan: a torch.autograd.Function, and the same as registered operators.

Saved for backward: x, the parameters and what the mixer keeps, a few numbers a token; none of them is written to.
The dropout mask is computed again from its seed. Gradients that will be differentiated or transformed themselves are
computed from the formula.

Eager mode calls the Function, which costs a third of an operator's dispatch. torch.compile, fake tensors and dispatch
modes see the operators gci_kernels::bottleneck and ::bottleneck_backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gci_kernels.ops.arguments import from_rows, new_record, rows, without_autocast
from gci_kernels.ops.bottleneck import reference, stages
from gci_kernels.ops.bottleneck.mixer import Call, Kept, Output
from gci_kernels.ops.bottleneck.operands import Operands, Settings, dropout_of, make_call
from gci_kernels.ops.bottleneck.plan import Plan
from gci_kernels.ops.bottleneck.registry import MIXERS, STAGES
from gci_kernels.ops.operators import define, no_derivative
from gci_kernels.ops.transforms import PLAIN, differentiated_again, dispatch_mode_depth, keeps_graph, plain_gradients

_TENSORS = len(Operands._fields)
_SAVED = _TENSORS - 1 + len(Kept._fields)


def _sum_dtype(stage: str, dtype: torch.dtype) -> torch.dtype:
    """What `project` and `reduce` return for operands of `dtype`: our own products leave their sums unrounded."""
    return torch.float32 if stage != "aten" and dtype in (torch.bfloat16, torch.float16) else dtype


def forward(t: Operands, s: Settings, projected: Tensor | None = None) -> tuple[Tensor, Kept, Tensor]:
    """y [..., out], what the mixer keeps, and its output; `projected`: of x, where it is known."""
    x, plan, A = rows(t.x), s.plan, t.A
    if projected is None:
        stack = torch.cat((A, t.weights)) if MIXERS[s.mixer].joins else A
        drop = None if t.seed is None else dropout_of(t, s)
        projected = stages.project(plan, x, stack.t(), drop)
    lead, sums = tuple(t.x.shape[:-1]), projected.dtype
    call = new_record(
        Call, (s.numbers, s.scaling, lead, A.shape[0], x.dtype, sums, plan.mix, t.segments, t.past)
    )  # fmt: skip
    u, kept, output = STAGES[s.mixer].forward(projected, t.weights, call)
    y = stages.expand(plan, u, t.B.t(), x, None if t.weight is None else t.weight.t(), t.bias)
    return from_rows(y, t.x), kept, output


def backward(
    dy: Tensor, doutput: Tensor | None, t: Operands, kept: Kept, s: Settings, needs: Sequence[bool]
) -> list[Tensor]:
    """The needed ones of [dx, dweight, dbias, dstack, dB, dweights], in this order.

    dstack is that of A and, behind it, of weights that join; dweights is needed only of weights that do not.
    """
    needs_x, needs_weight, needs_bias, needs_stack, needs_B, needs_weights = needs
    x, dy, plan, drop, gradients = rows(t.x), rows(dy), s.plan, dropout_of(t, s), []
    dprojected: Any = None
    if needs_x or needs_stack or needs_B or needs_weights:
        dprojected, dB, dweights = through_mixer(dy, doutput, t, kept, s, needs_B)
    if needs_x:
        stack = torch.cat((t.A, t.weights)) if MIXERS[s.mixer].joins else t.A
        dx = stages.expand(plan, dprojected, stack, dy, t.weight, None, drop)
        gradients.append(dx.view(t.x.shape))
    if needs_weight:
        gradients.append(torch.mm(dy.t(), x))
    if needs_bias:
        gradients.append(dy.sum(0))
    if needs_stack:
        gradients.append(stages.reduce(plan, dprojected, x, drop))
    if needs_B:
        gradients.append(dB.t().contiguous())
    if needs_weights:
        gradients.append(dweights)
    return gradients


def through_mixer(
    dy: Tensor, doutput: Tensor | None, t: Operands, kept: Kept, s: Settings, needs_B: bool
) -> tuple[Tensor, Any, Any]:
    """dprojected [tokens, rows of the stack], dB.T (None where it is not needed) and dweights, of dy [tokens, out]."""
    plan, mixer = s.plan, STAGES[s.mixer]
    call = make_call(t, s, _sum_dtype(plan.project, t.x.dtype), plan.mix)
    dB: Any = None
    if needs_B and stages.one_reading(plan, dy, t.B.shape[1]):
        du, dB = stages.project_reduce(plan, dy, t.B, mixer.recompute(t.weights, kept, call))
    else:
        du = stages.project(plan, dy, t.B)
    dprojected, dweights, u = mixer.backward(du, doutput, t.weights, kept, call)
    if needs_B and dB is None:
        dB = stages.reduce(plan, u, dy)
    return dprojected, dB, dweights


def gradients_of(
    dy: Tensor | None, doutput: Tensor | None, t: Operands, kept: Kept, s: Settings, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The needed ones of [dx, dweight, dbias, dA, dB, dweights] in their operands' dtypes, None for the others."""
    needs_x, needs_weight, needs_bias, needs_A, needs_B, needs_weights = needs
    if dy is None:  # only the output was used
        dy = t.x.new_zeros(*t.x.shape[:-1], t.B.shape[0])
    if differentiated_again(dy, doutput):
        return _formula_gradients(dy, doutput, t, s, needs)
    joins = MIXERS[s.mixer].joins
    needs_stack = needs_A or joins and needs_weights
    formed = [needs_x, needs_weight, needs_bias, needs_stack, needs_B, needs_weights and not joins]
    if torch.compiler.is_compiling() or dispatch_mode_depth() > 0:
        plain = (s.mixer, list(s.numbers), s.scaling, s.dropout_p, s.plan.key)
        tensors = (t.x, t.weight, *t[3:], *kept)
        found = torch.ops.gci_kernels.bottleneck_backward(dy, doutput, *tensors, *plain, formed)
    else:
        found = _exact_backward(dy, doutput, t, kept, s, formed)
    given = iter(found)
    made: Any = [next(given) if needed else None for needed in formed]
    dx, dweight, dbias, dstack, dB, dweights = made
    dA = dstack[: t.A.shape[0]].to(t.A.dtype) if needs_A else None
    if needs_weights:
        dweights = (dstack[t.A.shape[0] :] if joins else dweights).to(t.weights.dtype)
    return [dx, dweight, dbias, dA, None if dB is None else dB.to(t.B.dtype), dweights]


@without_autocast
def _formula_gradients(
    dy: Tensor, doutput: Tensor | None, t: Operands, s: Settings, needs: Sequence[bool]
) -> list[Tensor | None]:
    """:func:`gradients_of` in PyTorch's own operations, differentiable again."""
    names, mixer = Operands._fields[:6], MIXERS[s.mixer]
    wanted = {name: tensor for name, tensor, needed in zip(names, t, needs, strict=False) if needed and name != "bias"}
    carries = mixer.output is Output.DIFFERENTIABLE

    def formula(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        outputs = reference.bottleneck(t._replace(bias=None, **inputs), s, mixer)
        return outputs if carries else outputs[:1]

    found = plain_gradients(formula, wanted, (dy, doutput) if carries else (dy,))
    if needs[2]:
        found["bias"] = dy.reshape(-1, dy.shape[-1]).sum(0)
    return [found.get(name) for name in names]


def _saved(tensors: Sequence[Any]) -> tuple[Operands, Kept]:
    """What was saved for backward: the operands but the bias, which no gradient needs, and what the mixer keeps."""
    x, weight, *rest = tensors
    others = _TENSORS - 3
    return Operands(x, weight, None, *rest[:others]), Kept(*rest[others:])


_exact_backward = without_autocast(backward)


def keep_until_backward(y: Tensor, kept: Any) -> None:
    """Lets the graph of y, the result of one of our Functions, hold `kept` until its backward has run."""
    node: Any = y.grad_fn
    if node is not None:
        node.kept_until_backward = kept


def release(ctx: Any) -> None:
    """Ends :func:`keep_until_backward`, unless the graph is retained, so that its backward may run again."""
    if getattr(ctx, "kept_until_backward", None) is not None and not keeps_graph():
        ctx.kept_until_backward = None


class Bottleneck(torch.autograd.Function):
    """The op in eager mode: apply(*Operands, Settings) -> y, output."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        """See :func:`forward`."""
        t, s = new_record(Operands, args[:_TENSORS]), args[_TENSORS]
        y, kept, output = forward(t, s)
        ctx.set_materialize_grads(False)
        declared = MIXERS[s.mixer].output
        if declared is Output.CONSTANT:
            ctx.mark_non_differentiable(output)
        ctx.settings = s
        ctx.save_for_backward(t.x, t.weight, *t[3:], *kept)
        return y, None if declared is Output.NONE else output

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the Function and of the operator: :func:`gradients_of`, and None for the other inputs."""
        release(ctx)
        (t, kept), needs = _saved(ctx.saved_tensors), ctx.needs_input_grad
        return *gradients_of(dy, others[-1], t, kept, ctx.settings, needs[:6]), *[None] * (len(needs) - 6)


# Without torch.autograd.Function.apply's search for tensors of torch.func, under which the formula runs instead.
_apply = super(torch.autograd.Function, Bottleneck).apply
_apply_without_autocast = without_autocast(_apply)


def run(t: Operands, s: Settings, compiling: bool) -> tuple[Tensor, Any]:
    """The op on operands that fit each other: y, and the mixer's output (None or empty for none).

    By the Function, except for a compiler, for dispatch modes and for subclasses of Tensor: they get the operator.
    """
    device = t.x.device.type
    if compiling or dispatch_mode_depth() > 0 or type(t.x) not in PLAIN:
        plain = (s.mixer, list(s.numbers), s.scaling, s.dropout_p, s.plan.key)
        y, *_, output = torch.ops.gci_kernels.bottleneck(*t, *plain)
        return y, output
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return (_apply_without_autocast if autocast else _apply)(*t, s)


# The operators


def _settings(mixer: str, numbers: list[int], scaling: float, dropout_p: float, plan: str) -> Settings:
    return Settings(mixer, tuple(numbers), scaling, dropout_p, Plan.from_key(plan))


@without_autocast
def _bottleneck(*args: Any) -> tuple[Tensor, ...]:
    y, kept, output = forward(Operands(*args[:_TENSORS]), _settings(*args[_TENSORS:]))
    return y, *kept, output


def _bottleneck_fake(*args: Any) -> tuple[Tensor, ...]:
    t, s = Operands(*args[:_TENSORS]), _settings(*args[_TENSORS:])
    call = make_call(t, s, _sum_dtype(s.plan.project, t.x.dtype), s.plan.mix)
    others = STAGES[s.mixer].shapes(t.weights, call)
    y = t.x.new_empty(*t.x.shape[:-1], t.B.shape[0])
    return y, *(t.x.new_empty(shape, dtype=dtype) for shape, dtype in others)


@without_autocast
def _bottleneck_backward(dy: Tensor, doutput: Tensor | None, *args: Any) -> list[Tensor]:
    t, kept = _saved(args[:_SAVED])
    return backward(dy, doutput, t, kept, _settings(*args[_SAVED:-1]), args[-1])


def _bottleneck_backward_fake(dy: Tensor, doutput: Tensor | None, *args: Any) -> list[Tensor]:
    (t, _), s, needs = _saved(args[:_SAVED]), _settings(*args[_SAVED:-1]), args[-1]
    x, out, width, sums = t.x, t.B.shape[0], t.x.shape[-1], _sum_dtype(s.plan.reduce, t.x.dtype)
    stacked = t.A.shape[0] + (t.weights.shape[0] if MIXERS[s.mixer].joins else 0)
    made = [(x.shape, x.dtype), ((out, width), x.dtype), ((out,), x.dtype), ((stacked, width), sums), (t.B.shape, sums)]
    if t.weights is not None:
        made.append((t.weights.shape, x.dtype))
    return [x.new_empty(shape, dtype=dtype) for (shape, dtype), need in zip(made, needs, strict=False) if need]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, *kept, mixed = output
    ctx.settings = _settings(*inputs[_TENSORS:])
    ctx.set_materialize_grads(False)
    carries = MIXERS[ctx.settings.mixer].output is Output.DIFFERENTIABLE
    ctx.mark_non_differentiable(*kept, *([] if carries else [mixed]))
    x, weight, _, *rest = inputs[:_TENSORS]
    ctx.save_for_backward(x, weight, *rest, *kept)


_SETTINGS = "str mixer, int[] numbers, float scaling, float dropout_p, str plan"
_OPERANDS = "Tensor? weights, Tensor? segments, Tensor? past, Tensor? seed"
define(
    f"bottleneck(Tensor x, Tensor? weight, Tensor? bias, Tensor A, Tensor B, {_OPERANDS}, {_SETTINGS}) "
    "-> (Tensor y, Tensor projected, Tensor mixed, Tensor stats, Tensor output)",
    _bottleneck, _bottleneck_fake, Bottleneck.backward, _setup_context,
)  # fmt: skip
define(
    f"bottleneck_backward(Tensor dy, Tensor? doutput, Tensor x, Tensor? weight, Tensor A, Tensor B, "
    f"{_OPERANDS}, Tensor projected, Tensor mixed, Tensor stats, {_SETTINGS}, bool[6] needs) -> Tensor[]",
    _bottleneck_backward, _bottleneck_backward_fake, no_derivative("bottleneck_backward"),
)  # fmt: skip
