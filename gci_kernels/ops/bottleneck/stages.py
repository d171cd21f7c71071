"""Each stage by the implementation that a plan names, with dropout for the implementations that have none.

`drop` is None or a :class:`~gci_kernels.ops.bottleneck.philox.Dropout`: the first `drop.columns` vectors of the narrow
operand are multiplied with the masked wide operand, the others with the wide operand itself. The Triton products
compute the mask while they read; the other implementations work on a masked copy.
"""

import torch
from torch import Tensor

from gci_kernels.impl import implementation
from gci_kernels.ops.bottleneck.philox import Dropout
from gci_kernels.ops.bottleneck.plan import Plan

_MASKS_ITSELF = "triton"


def project(plan: Plan, x: Tensor, m: Tensor, drop: Dropout | None = None) -> Tensor:
    """x [tokens, depth] @ m [depth, width]; `drop` masks x for the first columns of m."""
    stage = implementation("bottleneck", plan.project).project
    if drop is None:
        return stage(x, m)
    if plan.project == _MASKS_ITSELF:
        return stage(x, m, drop)
    masked = implementation("bottleneck", plan.dropout).dropout(x, drop.p, drop.seed)
    dropped = stage(masked, m[:, : drop.columns])
    if drop.columns == m.shape[1]:
        return dropped
    return torch.cat((dropped, stage(x, m[:, drop.columns :])), dim=1)


def expand(
    plan: Plan, u: Tensor, m: Tensor, x: Tensor, w: Tensor | None, bias: Tensor | None, drop: Dropout | None = None
) -> Tensor:
    """u [tokens, rank] @ m + x [tokens, depth] @ w [depth, width] + bias; `drop` masks u's first columns' product."""
    stage = implementation("bottleneck", plan.expand)
    if drop is None:
        return stage.expand(u, m, x, w, bias)
    if plan.expand == _MASKS_ITSELF:
        return stage.expand(u, m, x, w, bias, drop)
    y = stage.expand(u[:, : drop.columns], m[: drop.columns], x, None, None)
    implementation("bottleneck", plan.dropout).dropout_(y, drop.p, drop.seed)
    return stage.expand_onto(y, u[:, drop.columns :], m[drop.columns :], x, w, bias)


def add_product(plan: Plan, y: Tensor, x: Tensor, w: Tensor) -> None:
    """y [tokens, width] += x [tokens, depth] @ w [depth, width], in place: the library's product, which sums onto y."""
    if plan.expand == "upcast":
        implementation("bottleneck", plan.expand).add_product(y, x, w)
    else:
        y.addmm_(x, w)


def reduce(plan: Plan, u: Tensor, y: Tensor, drop: Dropout | None = None) -> Tensor:
    """u.T @ y for u [tokens, rank] and y [tokens, width]; `drop` masks y for the first columns of u."""
    stage = implementation("bottleneck", plan.reduce).reduce
    if drop is None:
        return stage(u, y)
    if plan.reduce == _MASKS_ITSELF:
        return stage(u, y, drop)
    masked = implementation("bottleneck", plan.dropout).dropout(y, drop.p, drop.seed)
    dropped = stage(u[:, : drop.columns], masked)
    if drop.columns == u.shape[1]:
        return dropped
    return torch.cat((dropped, stage(u[:, drop.columns :], y)))


def one_reading(plan: Plan, y: Tensor, rank: int) -> bool:
    """Whether :func:`project_reduce` is there for y; else project and reduce read it in turn."""
    return plan.project == plan.reduce == "triton" and implementation("bottleneck", "triton").one_reading(y, rank)


def project_reduce(plan: Plan, y: Tensor, m: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """y @ m and u.T @ y from one reading of y [tokens, width]."""
    return implementation("bottleneck", plan.project).project_reduce(y, m, u)
