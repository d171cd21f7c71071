"""ALoRA's mixer (arXiv 2405.17830): causal attention over the sequence in the rank-r space (ops/attention).

Weights: qkv [3r, r], the maps of z = x @ A.T to q, k and v. Settings: number of heads, and 1 where z is added to the
attention's output. past [batch, past, 2r]: k and v of the tokens before x's, side by side. Output: the same of x's own
tokens, [batch, time, 2r], for a cache. q, k and v are computed again in backward from z, which is as small as any of
them.
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from gci_kernels.impl import implementation
from gci_kernels.ops.arguments import check_tensor, new_record
from gci_kernels.ops.attention import reference
from gci_kernels.ops.attention.api import check_heads
from gci_kernels.ops.bottleneck.mixer import Call, Kept, Mixer, Output, Shape
from gci_kernels.ops.bottleneck.registry import register


def formula(z: Tensor, qkv: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """u = o, or o + z: o is the attention of q to past and present k and v, [q | k | v] = z @ qkv.T; and k and v."""
    heads, residual = call.settings
    made = F.linear(z if z.dim() == 3 else z.unsqueeze(0), qkv)
    q, new = made.tensor_split([z.shape[-1]], dim=-1)
    k, v = (new if call.past is None else torch.cat((call.past, new), dim=1)).chunk(2, dim=-1)
    o = reference.forward(q, k, v, heads, call.segments)[0].view(z.shape)
    return o + z if residual else o, new


def check(x: Tensor, A: Tensor, qkv: Tensor | None, settings: tuple[int, ...]) -> None:
    """That rank, heads and maps fit each other."""
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be [batch, time, in] or [time, in], got {list(x.shape)}")
    if qkv is None:
        raise TypeError("qkv must be a tensor, got None")
    r = A.shape[0]
    check_heads(r, settings[0])
    check_tensor("qkv", qkv, (3 * r, r), x, same_dtype=False)


def _qkv(z: Tensor, qkv: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [batch, time, r]; k and v [batch, past + time, r]; and the new k and v side by side.

    Without a batch dimension there is one sequence.
    """
    *lead, time = call.lead
    made = torch.mm(z, qkv.to(z.dtype).t()).view(math.prod(lead), time, 3 * call.rank)
    q, new = made[..., : call.rank], made[..., call.rank :]
    known = new if call.past is None else torch.cat((call.past, new), dim=1)
    return q, known[..., : call.rank], known[..., call.rank :], new


def forward(projected: Tensor, qkv: Tensor, call: Call) -> tuple[Tensor, Kept, Tensor]:
    """See :class:`~gci_kernels.ops.bottleneck.mixer.Stages`."""
    z = projected.to(call.dtype)
    q, k, v, new = _qkv(z, qkv, call)
    o, lse = implementation("attention", call.impl).forward(q, k, v, call.settings[0], call.segments)
    # A copy: what is kept for generation must not keep q alive, nor be a view of what another output is.
    kept = new_record(Kept, (z, o, lse))
    return recompute(qkv, kept, call), kept, new.clone(memory_format=torch.contiguous_format)


def recompute(qkv: Tensor, kept: Kept, call: Call) -> Tensor:
    """See :class:`~gci_kernels.ops.bottleneck.mixer.Stages`."""
    z, o = kept.projected, kept.mixed.reshape(kept.projected.shape)
    return torch.add(o, z).mul_(call.scaling) if call.settings[1] else o * call.scaling


def backward(
    du: Tensor, doutput: Tensor | None, qkv: Tensor, kept: Kept, call: Call
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See :class:`~gci_kernels.ops.bottleneck.mixer.Stages`."""
    z, r = kept.projected, call.rank
    q, k, v, _ = _qkv(z, qkv, call)
    do = (du * call.scaling).to(call.dtype)
    dq, dk, dv = implementation("attention", call.impl).backward(
        do.view(q.shape), q, k, v, kept.mixed, kept.stats, call.settings[0], call.segments
    )
    past = k.shape[1] - q.shape[1]
    dmade = torch.cat((dq, dk[:, past:], dv[:, past:]), dim=-1).view(z.shape[0], 3 * r)
    weights = qkv.to(z.dtype)
    dz = torch.addmm(do, dmade, weights) if call.settings[1] else torch.mm(dmade, weights)
    return dz, torch.mm(dmade.t(), z), recompute(qkv, kept, call)


def shapes(qkv: Tensor, call: Call) -> list[Shape]:
    """See :class:`~gci_kernels.ops.bottleneck.mixer.Stages`."""
    *lead, time = call.lead
    batch, r, dtype = math.prod(lead), call.rank, call.dtype
    lse = (batch, call.settings[0], time), torch.promote_types(dtype, torch.float32)
    return [((batch * time, r), dtype), ((batch, time, r), dtype), lse, ((batch, time, 2 * r), dtype)]


ATTENTION = register(Mixer(
    "attention", formula, output=Output.CONSTANT, check=check, stages=sys.modules[__name__],
    implementations=frozenset(("native", "triton")), kernel="attention",
    decode=lambda qkv, settings: (None, None, qkv, settings[0], bool(settings[1])),
))  # fmt: skip
