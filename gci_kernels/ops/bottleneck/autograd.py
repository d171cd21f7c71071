"""The registered operators gci_kernels::bottleneck and ::bottleneck_backward, and the derivative that joins them.

One forward and one backward serve every mixer and every plan. Saved for backward: x, `projected` and the parameters,
none of them written to. Dropout is made again from its seed.
"""

import torch
from torch import Tensor

from gci_kernels.impl import Plan
from gci_kernels.ops.bottleneck import mix, run
from gci_kernels.ops.bottleneck.philox import Dropout

_library = torch.library.Library("gci_kernels", "DEF")
_library.define(
    "bottleneck(Tensor x, Tensor? weight, Tensor? bias, Tensor A, Tensor B, Tensor? router, Tensor? seed, "
    "float scaling, int top_k, float dropout_p, str plan) -> (Tensor y, Tensor projected, Tensor gates)"
)
_library.define(
    "bottleneck_backward(Tensor dy, Tensor? dgates, Tensor x, Tensor? weight, Tensor A, Tensor B, Tensor? router, "
    "Tensor? seed, Tensor projected, float scaling, int top_k, float dropout_p, str plan, bool[5] needs) -> Tensor[]"
)


def _rows(x: Tensor) -> Tensor:
    """x as [tokens, features] with contiguous rows; a copy only where the strides allow no such view."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _stack(A: Tensor, router: Tensor | None) -> Tensor:
    """[A; router], what `project` multiplies with."""
    return A if router is None else torch.cat((A, router))


def _saved_dtype(plan: Plan, router: Tensor | None, dtype: torch.dtype) -> torch.dtype:
    """What `projected` is saved in: a router's logits as `project` summed them, without one just x's dtype."""
    return dtype if router is None else _sum_dtype(plan.project, dtype)


def _sum_dtype(stage: str, dtype: torch.dtype) -> torch.dtype:
    """What `project` and `reduce` return for operands of `dtype`: our own products leave their sums unrounded."""
    return torch.float32 if stage != "aten" and dtype in (torch.bfloat16, torch.float16) else dtype


def _bottleneck(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, router: Tensor | None,
    seed: Tensor | None, scaling: float, top_k: int, dropout_p: float, plan: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    stages, rows = Plan.from_key(plan), _rows(x)
    # The router sees x before dropout.
    drop = None if seed is None else Dropout(dropout_p, int(seed), A.shape[0])
    projected = run.project(stages, rows, _stack(A, router).t(), drop)
    experts = 0 if router is None else router.shape[0]
    projected = projected.to(_saved_dtype(stages, router, x.dtype))
    u, gates = mix.forward(projected, experts, top_k, scaling, x.dtype, stages.mix)
    y = run.expand(stages, u, B.t(), rows, None if weight is None else weight.t(), bias)
    shape = x.shape[:-1]
    return y.view(*shape, B.shape[0]), projected, gates.view(*shape, experts) if experts else gates


def _bottleneck_fake(x, weight, bias, A, B, router, seed, scaling, top_k, dropout_p, plan):
    experts = 0 if router is None else router.shape[0]
    tokens = x.numel() // x.shape[-1]
    gates_dtype = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(*x.shape[:-1], B.shape[0]),
        x.new_empty(tokens, A.shape[0] + experts, dtype=_saved_dtype(Plan.from_key(plan), router, x.dtype)),
        x.new_empty(*x.shape[:-1], experts, dtype=gates_dtype) if experts else x.new_empty(0),
    )


def _bottleneck_backward(
    dy: Tensor, dgates: Tensor | None, x: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, router: Tensor | None,
    seed: Tensor | None, projected: Tensor, scaling: float, top_k: int, dropout_p: float, plan: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The needed ones of [dx, dweight, dbias, d[A; router], dB], in this order."""
    needs_x, needs_weight, needs_bias, needs_stack, needs_B = needs
    stages, rows, dy = Plan.from_key(plan), _rows(x), _rows(dy)
    experts = 0 if router is None else router.shape[0]
    drop = None if seed is None else Dropout(dropout_p, int(seed), A.shape[0])
    if needs_x or needs_stack or needs_B:
        dB = None
        if needs_B and run.one_reading(stages, dy, B.shape[1]):
            u, _ = mix.forward(projected, experts, top_k, scaling, x.dtype, stages.mix)
            du, dB = run.project_reduce(stages, dy, B, u)
        else:
            du = run.project(stages, dy, B)
        if dgates is not None:
            dgates = dgates.reshape(-1, experts)
        dprojected, u = mix.backward(du, dgates, projected, experts, top_k, scaling, x.dtype, stages.mix)
        if needs_B and dB is None:
            dB = run.reduce(stages, u, dy)
    gradients = []
    if needs_x:
        dx = run.expand(stages, dprojected, _stack(A, router), dy, weight, None, drop)
        gradients.append(dx.view(x.shape))
    if needs_weight:
        gradients.append(torch.mm(dy.t(), rows))
    if needs_bias:
        gradients.append(dy.sum(0))
    if needs_stack:
        gradients.append(run.reduce(stages, dprojected, rows, drop))
    if needs_B:
        gradients.append(dB.t().contiguous())
    return gradients


def _bottleneck_backward_fake(
    dy, dgates, x, weight, A, B, router, seed, projected, scaling, top_k, dropout_p, plan, needs
):
    out, width = B.shape[0], x.shape[-1]
    stack_rows = A.shape[0] + (0 if router is None else router.shape[0])
    shapes = [tuple(x.shape), (out, width), (out,), (stack_rows, width), (out, A.shape[0])]
    sums = _sum_dtype(Plan.from_key(plan).reduce, x.dtype)
    dtypes = [x.dtype, x.dtype, x.dtype, sums, sums]
    return [x.new_empty(s, dtype=d) for s, d, needed in zip(shapes, dtypes, needs, strict=True) if needed]


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, A, B, router, seed, *ctx.settings = inputs
    _, projected, gates = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(projected, *([gates] if router is None else []))
    ctx.save_for_backward(x, weight, A, B, router, seed, projected)


def _backward(ctx, dy, dprojected, dgates):
    """Gradients of gci_kernels::bottleneck, formed only where something needs them."""
    x, weight, A, B, router, seed, projected = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_A, needs_B, needs_router = ctx.needs_input_grad[:6]
    if dy is None:  # only the gates were used
        dy = x.new_zeros(*x.shape[:-1], B.shape[0])
    needs = [needs_x, needs_weight, needs_bias, needs_A or needs_router, needs_B]
    gradients = iter(
        torch.ops.gci_kernels.bottleneck_backward(
            dy, dgates, x, weight, A, B, router, seed, projected, *ctx.settings, needs
        )
    )
    dx, dweight, dbias, dstack, dB = (next(gradients) if needed else None for needed in needs)
    dA = dstack[: A.shape[0]].to(A.dtype) if needs_A else None
    drouter = dstack[A.shape[0] :].to(router.dtype) if needs_router else None
    dB = dB.to(B.dtype) if needs_B else None
    return dx, dweight, dbias, dA, dB, drouter, None, None, None, None, None


def _no_double_backward(ctx, *gradients):
    raise RuntimeError("gci_kernels has no second derivative; use impl='reference' where one is needed")


_library.impl("bottleneck", _bottleneck, "CompositeExplicitAutograd")
_library.impl("bottleneck_backward", _bottleneck_backward, "CompositeExplicitAutograd")
torch.library.register_fake("gci_kernels::bottleneck", _bottleneck_fake, lib=_library)
torch.library.register_fake("gci_kernels::bottleneck_backward", _bottleneck_backward_fake, lib=_library)
torch.library.register_autograd("gci_kernels::bottleneck", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("gci_kernels::bottleneck_backward", _no_double_backward, lib=_library)
bottleneck = torch.ops.gci_kernels.bottleneck.default
