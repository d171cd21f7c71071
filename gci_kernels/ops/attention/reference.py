"""The attention as its formula; differentiable by autograd (ALoRA, arXiv 2405.17830)."""

import torch
from torch import Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, num_heads: int, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """The attention's output and the logarithm of each query's softmax sum; all scores are in memory at once.

    Args:
        q: [batch, time, r], any floating dtype, device and strides.
        k, v: [batch, keys, r] with keys >= time, like q.
        num_heads: a divisor of r.
        segments: int32 [batch, keys], negative for padding; None: each row is one sequence without padding.

    Returns:
        o [batch, time, r], contiguous, in q's dtype; lse [batch, num_heads, time] in float32, float64 where q is.
    """
    dtype, past = q.dtype, k.shape[1] - q.shape[1]
    q, k, v = (t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v))
    visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(past)
    padding = None
    if segments is not None:
        own = segments[:, past:]
        padding = (own < 0).unsqueeze(-1)
        q = q.masked_fill(padding, 0)
        k, v = (t.masked_fill((segments < 0).unsqueeze(-1), 0) for t in (k, v))
        # Padding attends padding of the same id here, so that no softmax is NaN; its o is set to 0 below.
        visible = (visible & (own.unsqueeze(2) == segments.unsqueeze(1))).unsqueeze(1)
    q, k, v = (t.unflatten(2, (num_heads, t.shape[2] // num_heads)).transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(~visible, float("-inf"))
    o = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2).contiguous()
    lse = scores.logsumexp(-1)
    if padding is not None:
        o, lse = o.masked_fill(padding, 0), lse.masked_fill(padding.transpose(1, 2), float("-inf"))
    return o.to(dtype), lse
