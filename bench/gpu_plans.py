"""Plans of the bottleneck, forced on a layer so that those that "auto" does not take can be timed too.

The library's `expand` adds two products, in one of two orders: both are timed, whichever the package takes.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from gci_kernels.ops.bottleneck import api, aten, choose_plan
from gci_kernels.ops.bottleneck.plan import Plan
from gci_kernels.ops.bottleneck.registry import find

from .cases import LayerCase, LayerInputs, LayerVariant, gci_variant, registered_methods

Expand = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def adapter_first(u: Tensor, m: Tensor, x: Tensor, w: Tensor | None, bias: Tensor | None) -> Tensor:
    """What aten.expand computes: the base product is accumulated onto the adapter's."""
    m = m.to(u.dtype)
    return torch.mm(u, m) if w is None else F.linear(u, m.t(), bias).addmm_(x, w)


def base_first(u: Tensor, m: Tensor, x: Tensor, w: Tensor | None, bias: Tensor | None) -> Tensor:
    """The same; the adapter's product is accumulated onto the base product."""
    m = m.to(u.dtype)
    return torch.mm(u, m) if w is None else F.linear(x, w.t(), bias).addmm_(u, m)


#: The orders of the library's two products by name.
ORDERS: dict[str, Expand] = {"adapter first": adapter_first, "base first": base_first}


@contextlib.contextmanager
def library_order(order: Expand) -> Iterator[None]:
    """The library's `expand` is `order` meanwhile."""
    with patch.object(aten, "expand", order):
        yield


@dataclass(frozen=True)
class PlannedVariant(LayerVariant):
    """A layer whose every call takes `plan`, and `order` where the plan's `expand` is the library's."""

    plan: Plan
    order: Expand

    def step(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Forward and backward by the plan."""
        with patch.object(api, "plan_for", lambda *_, **__: self.plan), library_order(self.order):
            return super().step()


def plans(case: LayerCase, device: torch.device) -> dict[str, tuple[Plan, Expand]]:
    """name -> plan and order. Those with "triton" in their name can only be made where Triton runs."""
    mixer = "identity" if case.method == "lora" else registered_methods()[case.method].mixer.name
    library = choose_plan("aten", case.tokens, case.dtype, device.type, mixer)
    triton = Plan(*["triton"] * len(Plan._fields))
    if "triton" not in find(mixer).implementations:
        triton = triton._replace(mix="aten")
    return {
        "library, adapter first": (library, adapter_first),
        "library, base first": (library, base_first),
        "triton expand": (library._replace(expand="triton"), adapter_first),
        "triton, library expand": (triton._replace(expand="aten"), adapter_first),
        "triton": (triton, adapter_first),
    }


def planned_variant(inputs: LayerInputs, plan: Plan, order: Expand) -> PlannedVariant:
    """The adapted layer by a plan."""
    made = gci_variant(inputs)
    return PlannedVariant(made.forward, made.leaves, made.dy, plan, order)
