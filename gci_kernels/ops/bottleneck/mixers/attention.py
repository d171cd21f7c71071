"""ALoRA's mixer: causal attention over the sequence in the rank-r space (ops/attention).

Weights: qkv [3r, r], the maps of z = x @ A.T to q, k and v. Settings: number of heads, and whether z is added to the
attention's output. past [batch, past, 2r]: k and v of the tokens before x's, side by side. Shown: the same of x's own
tokens, [batch, time, 2r], for a cache. q, k and v are made again in backward from z, which is as small as any of them.
"""

import functools
import importlib
import math
from types import ModuleType

import torch
from torch import Tensor

from gci_kernels.ops.bottleneck.mixers import Call, Inputs, Kept

JOINS = False


@functools.cache
def _attention(impl: str) -> ModuleType:
    """ops/attention's module aten.py, native.py or triton.py; loaded when a plan first names it."""
    return importlib.import_module(f"gci_kernels.ops.attention.{impl}")


def _batch(call: Call) -> tuple[int, int]:
    """x's rows as batch and time; without a batch dimension there is one sequence."""
    *lead, time = call.lead
    return math.prod(lead), time


def _qkv(z: Tensor, inputs: Inputs, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [batch, time, r]; k and v [batch, past + time, r]; and the new k and v side by side."""
    made = torch.mm(z, inputs.weights.to(z.dtype).t()).view(*_batch(call), 3 * call.rank)
    q, new = made[..., : call.rank], made[..., call.rank :]
    known = new if inputs.past is None else torch.cat((inputs.past, new), dim=1)
    return q, known[..., : call.rank], known[..., call.rank :], new


def _u(o: Tensor, z: Tensor, call: Call) -> Tensor:
    o = o.reshape(z.shape)
    return torch.add(o, z).mul_(call.scaling) if call.settings[1] else o * call.scaling


def forward(projected: Tensor, inputs: Inputs, call: Call) -> tuple[Tensor, Kept, Tensor]:
    z = projected.to(call.dtype)
    q, k, v, new = _qkv(z, inputs, call)
    o, lse = _attention(call.impl).forward(q, k, v, call.settings[0], inputs.segments)
    # A copy: what is kept for generation must not keep q alive, nor be a view of what another output is.
    return _u(o, z, call), Kept(z, o, lse), new.clone(memory_format=torch.contiguous_format)


def again(inputs: Inputs, kept: Kept, call: Call) -> Tensor:
    return _u(kept.mixed, kept.projected, call)


def backward(
    du: Tensor, dshown: Tensor | None, inputs: Inputs, kept: Kept, call: Call
) -> tuple[Tensor, Tensor | None, Tensor]:
    z, r = kept.projected, call.rank
    q, k, v, _ = _qkv(z, inputs, call)
    do = (du * call.scaling).to(call.dtype)
    dq, dk, dv = _attention(call.impl).backward(
        do.view(q.shape), q, k, v, kept.mixed, kept.stats, call.settings[0], inputs.segments
    )
    past = k.shape[1] - q.shape[1]
    dmade = torch.cat((dq, dk[:, past:], dv[:, past:]), dim=-1).view(z.shape[0], 3 * r)
    weights = inputs.weights.to(z.dtype)
    dz = torch.addmm(do, dmade, weights) if call.settings[1] else torch.mm(dmade, weights)
    return dz, torch.mm(dmade.t(), z), again(inputs, kept, call)


def shapes(inputs: Inputs, call: Call) -> list[tuple[tuple[int, ...], torch.dtype]]:
    (batch, time), r, dtype = _batch(call), call.rank, call.dtype
    lse = (batch, call.settings[0], time), torch.promote_types(dtype, torch.float32)
    return [((batch * time, r), dtype), ((batch, time, r), dtype), lse, ((batch, time, 2 * r), dtype)]
