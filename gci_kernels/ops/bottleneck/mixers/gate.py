"""LoRAMoE's mixer (arXiv 2312.09979): each expert's r values times its softmax gate (ops/gate).

Weights: the router [experts, in], which joins `project`. Settings: top_k. Output: the gates [*lead, experts].
"""

import math
import sys

import torch
from torch import Tensor

from gci_kernels.impl import implementation
from gci_kernels.limits import MAX_EXPERTS
from gci_kernels.ops.arguments import check_tensor, new_record
from gci_kernels.ops.bottleneck.mixer import Call, Kept, Mixer, Output, Shape
from gci_kernels.ops.bottleneck.registry import register
from gci_kernels.ops.gate import reference


def formula(h: Tensor, logits: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """u = gates * h and the gates = softmax(x @ router.T), of which the top_k largest are kept and renormalised."""
    return reference.gate(h, logits, call.settings[0])


def check(x: Tensor, A: Tensor, router: Tensor | None, settings: tuple[int, ...]) -> None:
    """That the experts' sizes fit each other."""
    if router is None:
        raise TypeError("router must be a tensor, got None")
    check_tensor("router", router, (None, x.shape[-1]), x, same_dtype=False)
    experts, top_k = router.shape[0], settings[0]
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"router must have 1 to {MAX_EXPERTS} rows (num_experts), got {list(router.shape)}")
    if A.shape[0] % experts:
        raise ValueError(f"A must have num_experts*r rows: {A.shape[0]} is not a multiple of num_experts={experts}")
    if not (isinstance(top_k, int) and 1 <= top_k <= experts):
        raise ValueError(f"top_k must be None or an integer in [1, num_experts={experts}], got {top_k}")


def forward(projected: Tensor, router: Tensor, call: Call) -> tuple[Tensor, Kept, Tensor]:
    """See :class:`~gci_kernels.ops.bottleneck.mixer.Stages`."""
    experts = router.shape[0]
    u, gates = implementation("gate", call.impl).forward(projected, experts, call.settings[0], call.scaling, call.dtype)
    return u, new_record(Kept, (projected, u.new_empty(0), u.new_empty(0))), gates.view(*call.lead, experts)


def recompute(router: Tensor, kept: Kept, call: Call) -> Tensor:
    """See :class:`~gci_kernels.ops.bottleneck.mixer.Stages`."""
    return forward(kept.projected, router, call)[0]


def backward(
    du: Tensor, dgates: Tensor | None, router: Tensor, kept: Kept, call: Call
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See :class:`~gci_kernels.ops.bottleneck.mixer.Stages`."""
    experts = router.shape[0]
    rows = None if dgates is None else dgates.reshape(-1, experts)
    dprojected, u = implementation("gate", call.impl).backward(
        du, rows, kept.projected, experts, call.settings[0], call.scaling, call.dtype
    )
    return dprojected, None, u


def shapes(router: Tensor, call: Call) -> list[Shape]:
    """See :class:`~gci_kernels.ops.bottleneck.mixer.Stages`."""
    tokens, experts = math.prod(call.lead), router.shape[0]
    gates = (*call.lead, experts), torch.promote_types(call.dtype, torch.float32)
    return [((tokens, call.rank + experts), call.sum_dtype), ((0,), call.dtype), ((0,), call.dtype), gates]


GATE = register(Mixer(
    "gate", formula, joins=True, output=Output.DIFFERENTIABLE, check=check, stages=sys.modules[__name__],
    implementations=frozenset(("native", "triton")), kernel="gate",
    decode=lambda router, settings: (router, settings[0], None, 1, False),
))  # fmt: skip
