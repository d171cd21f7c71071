"""The registered operators gci_kernels::bottleneck and ::bottleneck_backward, and the derivative that joins them.

One forward and one backward serve every mixer and every plan. Saved for backward: x, the parameters and what the mixer
keeps, a few numbers a token; none of them is written to. Dropout is made again from its seed. Gradients that will be
differentiated or transformed themselves are those of the formula, which is then computed again.
"""

import torch
from torch import Tensor

from gci_kernels.impl import Plan
from gci_kernels.ops.arguments import from_rows, rows, without_autocast
from gci_kernels.ops.bottleneck import reference, stages
from gci_kernels.ops.bottleneck.mixers import Call, Inputs, Kept, mixer
from gci_kernels.ops.bottleneck.philox import Dropout
from gci_kernels.ops.transforms import differentiated_again, plain_gradients

_library = torch.library.Library("gci_kernels", "DEF")
_SETTINGS = "str name, int[] settings, float scaling, float dropout_p, str plan"
_library.define(
    "bottleneck(Tensor x, Tensor? weight, Tensor? bias, Tensor A, Tensor B, Tensor? weights, Tensor? segments, "
    f"Tensor? past, Tensor? seed, {_SETTINGS}) "
    "-> (Tensor y, Tensor projected, Tensor mixed, Tensor stats, Tensor shown)"
)
_library.define(
    "bottleneck_backward(Tensor dy, Tensor? dshown, Tensor x, Tensor? weight, Tensor A, Tensor B, Tensor? weights, "
    "Tensor? segments, Tensor? past, Tensor? seed, Tensor projected, Tensor mixed, Tensor stats, "
    f"{_SETTINGS}, bool[6] needs) -> Tensor[]"
)


def _stack(A: Tensor, weights: Tensor | None, joins: bool) -> Tensor:
    """What `project` multiplies with: A, and the mixer's weights where they join it."""
    return torch.cat((A, weights)) if joins else A


def _sum_dtype(stage: str, dtype: torch.dtype) -> torch.dtype:
    """What `project` and `reduce` return for operands of `dtype`: our own products leave their sums unrounded."""
    return torch.float32 if stage != "aten" and dtype in (torch.bfloat16, torch.float16) else dtype


def _call(x: Tensor, A: Tensor, settings: list[int], scaling: float, chosen: Plan) -> Call:
    sum_dtype = _sum_dtype(chosen.project, x.dtype)
    return Call(settings, scaling, tuple(x.shape[:-1]), A.shape[0], x.dtype, sum_dtype, chosen.mix)


def _drop(seed: Tensor | None, dropout_p: float, A: Tensor) -> Dropout | None:
    """Dropout of what A's rows see of x; weights that join see x itself."""
    return None if seed is None else Dropout(dropout_p, int(seed), A.shape[0])


@without_autocast
def _bottleneck(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, weights: Tensor | None,
    segments: Tensor | None, past: Tensor | None, seed: Tensor | None,
    name: str, settings: list[int], scaling: float, dropout_p: float, plan: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    chosen, tokens, mix = Plan.from_key(plan), rows(x), mixer(name)
    stack = _stack(A, weights, mix.JOINS)
    projected = stages.project(chosen, tokens, stack.t(), _drop(seed, dropout_p, A))
    u, kept, shown = mix.forward(projected, Inputs(weights, segments, past), _call(x, A, settings, scaling, chosen))
    y = stages.expand(chosen, u, B.t(), tokens, None if weight is None else weight.t(), bias)
    return from_rows(y, x), *kept, shown


def _bottleneck_fake(x, weight, bias, A, B, weights, segments, past, seed, name, settings, scaling, dropout_p, plan):
    call = _call(x, A, settings, scaling, Plan.from_key(plan))
    others = mixer(name).shapes(Inputs(weights, segments, past), call)
    return x.new_empty(*x.shape[:-1], B.shape[0]), *(x.new_empty(shape, dtype=dtype) for shape, dtype in others)


@without_autocast
def _bottleneck_backward(
    dy: Tensor, dshown: Tensor | None, x: Tensor, weight: Tensor | None, A: Tensor, B: Tensor,
    weights: Tensor | None, segments: Tensor | None, past: Tensor | None, seed: Tensor | None,
    projected: Tensor, mixed: Tensor, stats: Tensor,
    name: str, settings: list[int], scaling: float, dropout_p: float, plan: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The needed ones of [dx, dweight, dbias, dstack, dB, dweights], in this order; see `_stack` and JOINS."""
    needs_x, needs_weight, needs_bias, needs_stack, needs_B, needs_weights = needs
    chosen, tokens, dy, mix = Plan.from_key(plan), rows(x), rows(dy), mixer(name)
    inputs, kept = Inputs(weights, segments, past), Kept(projected, mixed, stats)
    call, drop = _call(x, A, settings, scaling, chosen), _drop(seed, dropout_p, A)
    if needs_x or needs_stack or needs_B or needs_weights:
        dB = None
        if needs_B and stages.one_reading(chosen, dy, B.shape[1]):
            du, dB = stages.project_reduce(chosen, dy, B, mix.again(inputs, kept, call))
        else:
            du = stages.project(chosen, dy, B)
        dprojected, dweights, u = mix.backward(du, dshown, inputs, kept, call)
        if needs_B and dB is None:
            dB = stages.reduce(chosen, u, dy)
    gradients = []
    if needs_x:
        dx = stages.expand(chosen, dprojected, _stack(A, weights, mix.JOINS), dy, weight, None, drop)
        gradients.append(dx.view(x.shape))
    if needs_weight:
        gradients.append(torch.mm(dy.t(), tokens))
    if needs_bias:
        gradients.append(dy.sum(0))
    if needs_stack:
        gradients.append(stages.reduce(chosen, dprojected, tokens, drop))
    if needs_B:
        gradients.append(dB.t().contiguous())
    if needs_weights:
        gradients.append(dweights)
    return gradients


def _bottleneck_backward_fake(
    dy, dshown, x, weight, A, B, weights, segments, past, seed, projected, mixed, stats,
    name, settings, scaling, dropout_p, plan, needs,
):  # fmt: skip
    out, width, joins = B.shape[0], x.shape[-1], mixer(name).JOINS
    stack_rows = A.shape[0] + (weights.shape[0] if joins else 0)
    shapes = [tuple(x.shape), (out, width), (out,), (stack_rows, width), (out, A.shape[0])]
    sums = _sum_dtype(Plan.from_key(plan).reduce, x.dtype)
    dtypes = [x.dtype, x.dtype, x.dtype, sums, sums]
    if needs[5]:
        shapes, dtypes = [*shapes, tuple(weights.shape)], [*dtypes, x.dtype]
    needed = [(shape, dtype) for shape, dtype, need in zip(shapes, dtypes, needs, strict=False) if need]
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in needed]


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, A, B, weights, segments, past, seed, *ctx.settings = inputs
    _, projected, mixed, stats, shown = output
    ctx.set_materialize_grads(False)
    # Gates have a gradient. What generation caches has none.
    ctx.mark_non_differentiable(projected, mixed, stats, *([] if mixer(ctx.settings[0]).JOINS else [shown]))
    ctx.save_for_backward(x, weight, A, B, weights, segments, past, seed, projected, mixed, stats)


def _backward(ctx, dy, dprojected, dmixed, dstats, dshown):
    """Gradients of gci_kernels::bottleneck, formed only where something needs them."""
    x, weight, A, B, weights, *others = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_A, needs_B, needs_weights = ctx.needs_input_grad[:6]
    if dy is None:  # only what is shown was used
        dy = x.new_zeros(*x.shape[:-1], B.shape[0])
    if differentiated_again(dy, dshown):
        needs, inputs = ctx.needs_input_grad[:6], ctx.saved_tensors[:8]
        return *_formula_backward(dy, dshown, *inputs, *ctx.settings, needs), *[None] * 8
    joins = mixer(ctx.settings[0]).JOINS
    needs_stack = needs_A or joins and needs_weights
    needs = [needs_x, needs_weight, needs_bias, needs_stack, needs_B, needs_weights and not joins]
    gradients = iter(
        torch.ops.gci_kernels.bottleneck_backward(dy, dshown, x, weight, A, B, weights, *others, *ctx.settings, needs)
    )
    dx, dweight, dbias, dstack, dB, dweights = (next(gradients) if needed else None for needed in needs)
    dA = dstack[: A.shape[0]].to(A.dtype) if needs_A else None
    if joins and needs_weights:
        dweights = dstack[A.shape[0] :]
    dweights = dweights.to(weights.dtype) if needs_weights else None
    dB = dB.to(B.dtype) if needs_B else None
    return dx, dweight, dbias, dA, dB, dweights, *[None] * 8


def _formula(x, weight, A, B, weights, segments, past, seed, name, settings, scaling, dropout_p) -> tuple[Tensor, ...]:
    """What is differentiable of gci_kernels::bottleneck, without the bias."""
    base, drop = (x, weight, None), (dropout_p, seed)
    if name == "gate":
        return reference.loramoe_linear(*base, A, B, weights, scaling, settings[0], *drop)
    if name == "attention":
        heads, residual = settings
        return reference.alora_linear(*base, A, weights, B, heads, bool(residual), scaling, segments, past, *drop)[:1]
    return (reference.lora_linear(*base, A, B, scaling, *drop),)


@without_autocast
def _formula_backward(
    dy, dshown, x, weight, A, B, weights, segments, past, seed, name, settings, scaling, dropout_p, plan, needs
) -> list[Tensor | None]:  # fmt: skip
    """The needed ones of [dx, dweight, dbias, dA, dB, dweights], in PyTorch's own operations."""
    needs_bias, needs = needs[2], [*needs[:2], *needs[3:]]
    tensors = [x, weight, A, B, weights]

    def formula(*chosen: Tensor) -> tuple[Tensor, ...]:
        given = iter(chosen)
        inputs = [next(given) if needed else t for t, needed in zip(tensors, needs, strict=True)]
        return _formula(*inputs, segments, past, seed, name, settings, scaling, dropout_p)

    wanted = [t for t, needed in zip(tensors, needs, strict=True) if needed]
    gradients = iter(plain_gradients(formula, wanted, (dy, dshown) if name == "gate" else (dy,)))
    found = [next(gradients) if needed else None for needed in needs]
    return [*found[:2], dy.reshape(-1, dy.shape[-1]).sum(0) if needs_bias else None, *found[2:]]


def _no_double_backward(ctx, *gradients):
    raise RuntimeError("gci_kernels::bottleneck_backward has no derivative; use impl='reference' where one is needed")


_library.impl("bottleneck", _bottleneck, "CompositeExplicitAutograd")
_library.impl("bottleneck_backward", _bottleneck_backward, "CompositeExplicitAutograd")
torch.library.register_fake("gci_kernels::bottleneck", _bottleneck_fake, lib=_library)
torch.library.register_fake("gci_kernels::bottleneck_backward", _bottleneck_backward_fake, lib=_library)
torch.library.register_autograd("gci_kernels::bottleneck", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("gci_kernels::bottleneck_backward", _no_double_backward, lib=_library)
bottleneck = torch.ops.gci_kernels.bottleneck.default
