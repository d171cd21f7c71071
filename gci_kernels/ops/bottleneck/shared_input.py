"""Adapted layers that are given the same x, as one torch.autograd.Function: they share their passes over x.

`project` reads x once for the A of all layers and the weights that join them, and `reduce` once for all their
gradients; dX is summed inside the base products instead of by passes of its own. Each layer keeps its own mixer, its
own `expand` and its own base product, which stays one call of the library where it was one.

For eager mode without dropout alone. Gradients that will be differentiated or transformed themselves, and a backward
that dispatch modes watch, are computed layer by layer as those of :mod:`autograd`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gci_kernels.ops.arguments import autocast, new_record, rows, without_autocast
from gci_kernels.ops.bottleneck import stages
from gci_kernels.ops.bottleneck.autograd import forward as forward_of_one
from gci_kernels.ops.bottleneck.autograd import gradients_of, release, through_mixer
from gci_kernels.ops.bottleneck.mixer import Kept, Mixer, Output
from gci_kernels.ops.bottleneck.operands import Operands, Settings
from gci_kernels.ops.bottleneck.plan import plan_for
from gci_kernels.ops.bottleneck.registry import MIXERS
from gci_kernels.ops.transforms import differentiated_again, dispatch_mode_depth

#: The arguments of one layer's :func:`~gci_kernels.ops.bottleneck.adapted_linear`.
Arguments = tuple[tuple[Any, ...], Mixer, tuple[int, ...], float, float, str]

_OWN = 7  # operands that each layer has of its own: all but x and the seed
_KEPT = len(Kept._fields)
_SAVED = _OWN - 1 + _KEPT  # of each layer: its own operands but the bias, and what its mixer keeps


def adapted_linears(calls: Sequence[Arguments]) -> list[tuple[Tensor, Any]]:
    """:func:`~gci_kernels.ops.bottleneck.adapted_linear` of several layers that are given the same x.

    Differentiable as that is. A second backward through the graph of one layer goes through that of all, so losses of
    different layers are to be summed, or the graph is to be retained. Not for torch.compile, dispatch modes, transforms
    of torch.func and subclasses of Tensor.

    Args:
        calls: the layers' arguments, which fit each other: the same x [..., in], a weight in x's dtype, no seed, a
            dropout_p of 0, the same impl, and not "reference".

    Returns:
        For each layer y [..., out] and the mixer's output, None where it declares none.
    """
    x = calls[0][0][0]
    x, cast = autocast(x, None, None)[0], torch.is_autocast_enabled(x.device.type)
    tokens = x.numel() // x.shape[-1]
    settings: list[Settings] = []
    flat: list[Any] = []
    for (_, weight, bias, *others, _), mixer, numbers, scaling, _, impl in calls:
        plan = plan_for(impl, tokens, x.dtype, x.device.type, mixer.name, device=x.device, dropout=False)
        settings.append(new_record(Settings, (mixer.name, numbers, scaling, 0.0, plan)))
        if cast:
            _, weight, bias = autocast(x, weight, bias)
        flat += (weight, bias, *others)
    made = (_apply_without_autocast if cast else _apply)(x, settings, *flat)
    return list(zip(made[::2], made[1::2], strict=True))


def forward(layers: Sequence[Operands], settings: Sequence[Settings]) -> list[tuple[Tensor, Kept, Tensor]]:
    """For each layer y [..., out], what the mixer keeps, and its output."""
    stack, widths = _stack(layers, settings)
    projected = stages.project(settings[0].plan, rows(layers[0].x), stack.t()).split(widths, dim=1)
    # Mixers take contiguous rows, and what one layer keeps shall not keep the others' alive.
    return [forward_of_one(t, s, h.contiguous()) for h, t, s in zip(projected, layers, settings, strict=True)]


def _stack(layers: Sequence[Operands], settings: Sequence[Settings]) -> tuple[Tensor, list[int]]:
    """What `project` multiplies x with, [rows, in]: each A and, below it, weights that join; and each layer's rows."""
    parts: list[Tensor] = []
    widths = []
    for t, s in zip(layers, settings, strict=True):
        own = (t.A, t.weights) if MIXERS[s.mixer].joins else (t.A,)
        parts += own
        widths.append(sum(each.shape[0] for each in own))
    return torch.cat(parts), widths


class Part(NamedTuple):
    """One layer in backward: what came, what was saved, and which gradients are needed.

    Attributes:
        dy: [..., out].
        doutput: the gradient of the mixer's output; None: there is none.
        needs: of weight, bias, A, B and the mixer's weights.
    """

    dy: Tensor
    doutput: Tensor | None
    t: Operands
    kept: Kept
    s: Settings
    needs: Sequence[bool]

    @property
    def trains_stack(self) -> bool:
        """Whether A, or weights that join it, are trained."""
        return self.needs[2] or MIXERS[self.s.mixer].joins and self.needs[4]


def backward(parts: Sequence[Part], needs_x: bool) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """dX, and [dweight, dbias, dA, dB, dweights] of each layer whose outputs were used; None for what is not needed."""
    x, plan = rows(parts[0].t.x), parts[0].s.plan
    dys = [rows(part.dy) for part in parts]
    mixed: list[tuple[Any, Any, Any]] = []  # of each layer dprojected, dB.T and dweights
    for dy, (_, doutput, t, kept, s, needs) in zip(dys, parts, strict=True):
        needed = needs_x or any(needs[2:])
        mixed.append(through_mixer(dy, doutput, t, kept, s, needs[3]) if needed else (None, None, None))
    widths = [0 if each is None else each.shape[1] for each, _, _ in mixed]
    dx, dstacks = None, [None] * len(parts)
    if any(widths):
        dprojected = torch.cat([each for each, _, _ in mixed if each is not None], dim=1)
        if needs_x:
            dx = _dx(dys, dprojected, parts).view(parts[0].t.x.shape)
        if any(part.trains_stack for part in parts):
            dstacks = stages.reduce(plan, dprojected, x).split(widths)  # type: ignore[assignment]  # a tuple
    own = []
    for part, dy, dstack, (_, dB, dweights) in zip(parts, dys, dstacks, mixed, strict=True):
        own.append(_own_gradients(part, dy, x, dstack, dB, dweights))
    return dx, own


def _dx(dys: Sequence[Tensor], dprojected: Tensor, parts: Sequence[Part]) -> Tensor:
    """dX [tokens, in]: the adapters' share and the first base product together, the other base products onto it."""
    plan = parts[0].s.plan
    stack, _ = _stack([part.t for part in parts], [part.s for part in parts])
    dx = stages.expand(plan, dprojected, stack, dys[0], parts[0].t.weight, None)
    for dy, part in zip(dys[1:], parts[1:], strict=True):
        weight: Any = part.t.weight
        stages.add_product(plan, dx, dy, weight)
    return dx


def _own_gradients(part: Part, dy: Tensor, x: Tensor, dstack: Any, dB: Any, dweights: Any) -> list[Tensor | None]:
    """[dweight, dbias, dA, dB, dweights] of one layer, in its operands' dtypes."""
    t, (needs_weight, needs_bias, needs_A, _, needs_weights) = part.t, part.needs
    rank = t.A.shape[0]
    if MIXERS[part.s.mixer].joins and needs_weights:
        dweights = dstack[rank:]
    return [
        torch.mm(dy.t(), x) if needs_weight else None,
        dy.sum(0) if needs_bias else None,
        dstack[:rank].to(t.A.dtype) if needs_A else None,
        None if dB is None else dB.t().contiguous().to(t.B.dtype),
        dweights.to(t.weights.dtype) if needs_weights else None,
    ]


_exact_backward = without_autocast(lambda x, parts, needs_x: backward(parts, needs_x))


class SharedInput(torch.autograd.Function):
    """apply(x, [Settings of each layer], *[all other operands of each but the seed]) -> y and output of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: Sequence[Settings], *flat: Any) -> tuple[Tensor | None, ...]:
        """See :func:`forward`."""
        layers = [Operands(x, *flat[at : at + _OWN]) for at in range(0, len(flat), _OWN)]
        outputs: list[Any] = []
        saved: list[Any] = [x]
        constants = []
        for t, s, (y, kept, output) in zip(layers, settings, forward(layers, settings), strict=True):
            declared = MIXERS[s.mixer].output
            if declared is Output.CONSTANT:
                constants.append(output)
            outputs += (y, None if declared is Output.NONE else output)
            saved += (t.weight, *t[3 : _OWN + 1], *kept)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*constants)
        ctx.settings = settings
        ctx.save_for_backward(*saved)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients in the order of forward's arguments."""
        release(ctx)
        needs_x, _, *needs = ctx.needs_input_grad
        used = [at for at in range(len(ctx.settings)) if douts[2 * at] is not None or douts[2 * at + 1] is not None]
        dx, found = _gradients(_parts(ctx, douts, needs, used), needs_x)
        own: list[Tensor | None] = [None] * len(needs)
        for at, (dweight, dbias, dA, dB, dweights) in zip(used, found, strict=True):
            own[at * _OWN : at * _OWN + 5] = dweight, dbias, dA, dB, dweights
        return dx, None, *own


def _parts(ctx: Any, douts: Sequence[Tensor | None], needs: Sequence[bool], used: Sequence[int]) -> list[Part]:
    """The layers whose outputs were `used`, by their numbers."""
    x, *saved = ctx.saved_tensors
    parts = []
    for at in used:
        weight, A, B, weights, segments, past, *kept = saved[at * _SAVED : (at + 1) * _SAVED]
        t, dy = Operands(x, weight, None, A, B, weights, segments, past), douts[2 * at]
        if dy is None:  # only the mixer's output was used
            dy = x.new_zeros(*x.shape[:-1], B.shape[0])
        own = needs[at * _OWN : at * _OWN + 5]
        parts.append(Part(dy, douts[2 * at + 1], t, Kept(*kept), ctx.settings[at], own))
    return parts


def _gradients(parts: Sequence[Part], needs_x: bool) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """:func:`backward`, or layer by layer where something looks into it."""
    douts = [dout for part in parts for dout in part[:2]]
    if not (torch.compiler.is_compiling() or dispatch_mode_depth() > 0 or differentiated_again(*douts)):
        return _exact_backward(parts[0].t.x, parts, needs_x)
    found = [gradients_of(*part[:5], [needs_x, *part.needs]) for part in parts]
    dxs: list[Any] = [dx for dx, *_ in found]
    return sum(dxs[1:], start=dxs[0]) if needs_x else None, [own for _, *own in found]


# As in autograd.py: without apply's search for tensors of torch.func.
_apply = super(torch.autograd.Function, SharedInput).apply
_apply_without_autocast = without_autocast(_apply)
