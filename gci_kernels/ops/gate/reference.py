"""The gate as its formula; differentiable by autograd (LoRAMoE, arXiv 2312.09979)."""

import torch
from torch import Tensor

from gci_kernels.ops.transforms import captured


def gates(logits: Tensor, top_k: int) -> Tensor:
    """softmax over the experts (last dimension) in float32, or float64 for float64 logits; over the top_k largest."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if top_k < logits.shape[-1]:
        if captured():
            logits = logits.masked_fill(_rank(logits) >= top_k, float("-inf"))
        else:
            order = logits.argsort(dim=-1, descending=True, stable=True)
            logits = logits.scatter(-1, order[..., top_k:], float("-inf"))
    return logits.softmax(dim=-1)


def _rank(logits: Tensor) -> Tensor:
    """Each expert's place in a stable descending sort, which is not in ONNX: how many come before it."""
    other, own = logits.unsqueeze(-2), logits.unsqueeze(-1)
    lower = torch.ones(logits.shape[-1], logits.shape[-1], dtype=torch.bool, device=logits.device).tril(-1)
    return ((other > own) | ((other == own) & lower)).sum(-1)


def gate(h: Tensor, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """u = gates, repeated over each expert's r values, times h [..., num_experts*r]; and the gates [..., experts]."""
    weights = gates(logits, top_k)
    experts = weights.shape[-1]
    u = h.unflatten(-1, (experts, h.shape[-1] // experts)) * weights.to(h.dtype).unsqueeze(-1)
    return u.flatten(-2), weights
