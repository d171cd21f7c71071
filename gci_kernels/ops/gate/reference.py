"""The gate as its formula; differentiable by autograd (LoRAMoE, arXiv 2312.09979)."""

import torch
from torch import Tensor

from gci_kernels.ops.transforms import captured


def gates(logits: Tensor, top_k: int) -> Tensor:
    """The softmax of logits [..., experts] over the experts; over the top_k largest alone where top_k is less.

    In float32, or float64 for float64 logits; the gates of experts that are not kept are 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if top_k < logits.shape[-1]:
        if captured():
            logits = logits.masked_fill(_rank(logits) >= top_k, float("-inf"))
        else:
            order = logits.argsort(dim=-1, descending=True, stable=True)
            logits = logits.scatter(-1, order[..., top_k:], float("-inf"))
    return logits.softmax(dim=-1)


def _rank(logits: Tensor) -> Tensor:
    """Each expert's index in a stable descending sort, which ONNX does not have: how many experts come before it."""
    other, own = logits.unsqueeze(-2), logits.unsqueeze(-1)
    lower = torch.ones(logits.shape[-1], logits.shape[-1], dtype=torch.bool, device=logits.device).tril(-1)
    return ((other > own) | ((other == own) & lower)).sum(-1)


def gate(h: Tensor, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """u = h with each expert's r values multiplied by its gate, and the gates.

    Args:
        h: [..., experts*r], any floating dtype.
        logits: [..., experts], any floating dtype.
        top_k: how many gates of a token are kept, at most experts.

    Returns:
        u [..., experts*r] in h's dtype, and the gates [..., experts] as :func:`gates` returns them.
    """
    weights = gates(logits, top_k)
    experts = weights.shape[-1]
    u = h.unflatten(-1, (experts, h.shape[-1] // experts)) * weights.to(h.dtype).unsqueeze(-1)
    return u.flatten(-2), weights
