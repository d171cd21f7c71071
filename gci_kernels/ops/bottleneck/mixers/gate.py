"""LoRAMoE's mixer: each expert's r values times its softmax gate (ops/gate). Weights: the router; settings: top_k."""

import functools
import importlib
import math
from types import ModuleType

import torch
from torch import Tensor

from gci_kernels.ops.bottleneck.mixers import Call, Inputs, Kept

JOINS = True


@functools.cache
def implementation(impl: str) -> ModuleType:
    """ops/gate's module aten.py, native.py or triton.py; loaded when a plan first names it."""
    return importlib.import_module(f"gci_kernels.ops.gate.{impl}")


def _settings(inputs: Inputs, call: Call) -> tuple[int, int, float, torch.dtype]:
    return inputs.weights.shape[0], call.settings[0], call.scaling, call.dtype


def forward(projected: Tensor, inputs: Inputs, call: Call) -> tuple[Tensor, Kept, Tensor]:
    u, gates = implementation(call.impl).forward(projected, *_settings(inputs, call))
    return u, Kept(projected, u.new_empty(0), u.new_empty(0)), gates.view(*call.lead, gates.shape[1])


def again(inputs: Inputs, kept: Kept, call: Call) -> Tensor:
    return implementation(call.impl).forward(kept.projected, *_settings(inputs, call))[0]


def backward(
    du: Tensor, dshown: Tensor | None, inputs: Inputs, kept: Kept, call: Call
) -> tuple[Tensor, Tensor | None, Tensor]:
    settings = _settings(inputs, call)
    dgates = None if dshown is None else dshown.reshape(-1, settings[0])
    dprojected, u = implementation(call.impl).backward(du, dgates, kept.projected, *settings)
    return dprojected, None, u


def shapes(inputs: Inputs, call: Call) -> list[tuple[tuple[int, ...], torch.dtype]]:
    tokens, experts = math.prod(call.lead), inputs.weights.shape[0]
    gates = (*call.lead, experts), torch.promote_types(call.dtype, torch.float32)
    return [((tokens, call.rank + experts), call.sum_dtype), ((0,), call.dtype), ((0,), call.dtype), gates]
