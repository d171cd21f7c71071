"""The attention in library products, any device: a block of queries at a time against the keys up to its last one.

The products take the heads as a batch dimension: where q, k and v allow no such view, or are narrower than the sums,
they are copied once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Scores in memory at once. Smaller blocks compute fewer scores above the diagonal, larger ones need fewer launches.
_SCORES = 2**19
_MIN_ROWS = 16


def _by_head(t: Tensor, num_heads: int, segments: Tensor | None) -> Tensor:
    """t [batch, rows, r] as [batch * heads, rows, d] in the sums' dtype; padding, by `segments` [batch, rows], is 0."""
    if segments is not None:
        t = t.masked_fill((segments < 0).unsqueeze(-1), 0)
    batch, rows, r = t.shape
    t = t.to(torch.promote_types(t.dtype, torch.float32)).view(batch, rows, num_heads, r // num_heads)
    return t.transpose(1, 2).reshape(batch * num_heads, rows, r // num_heads)


def _from_heads(t: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """t [batch * heads, rows, d] as a contiguous [batch, rows, r] in `dtype`."""
    heads = t.shape[0]
    by_row = t.unflatten(0, (heads // num_heads, num_heads)).transpose(1, 2)
    return by_row.flatten(2).to(dtype).contiguous()


def _blocks(q: Tensor, keys: int) -> Iterator[tuple[slice, int]]:
    """Slices of the queries of q [heads, time, d], each with the end of the keys that its last query may attend."""
    heads, time = q.shape[:2]
    rows = max(_SCORES // max(heads * keys, 1), _MIN_ROWS)
    for start in range(0, time, rows):
        end = min(start + rows, time)
        yield slice(start, end), keys - time + end


def _scores(q: Tensor, k: Tensor, num_heads: int, rows: slice, edge: int, segments: Tensor | None) -> Tensor:
    """Scores [batch * heads, rows, edge] of a block, -inf where masked; no row is all -inf: padding attends itself."""
    block = q[:, rows]
    scores = torch.bmm(block * block.shape[2] ** -0.5, k[:, :edge].transpose(1, 2))
    first = edge - block.shape[1]
    later = torch.ones(block.shape[1], block.shape[1], dtype=torch.bool, device=q.device).triu(1)
    scores[:, :, first:].masked_fill_(later, float("-inf"))
    if segments is not None:
        other = segments[:, first:edge, None] != segments[:, None, :edge]
        scores.view(-1, num_heads, *scores.shape[1:]).masked_fill_(other.unsqueeze(1), float("-inf"))
    return scores


def forward(q: Tensor, k: Tensor, v: Tensor, num_heads: int, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """The attention's output and the logarithm of each query's softmax sum.

    Args:
        q: [batch, time, r], any floating dtype, device and strides.
        k, v: [batch, keys, r] with keys >= time, like q.
        num_heads: a divisor of r.
        segments: int32 [batch, keys], negative for padding; None: each row is one sequence without padding.

    Returns:
        o [batch, time, r], contiguous, in q's dtype; lse [batch, num_heads, time] in float32, float64 where q is.
    """
    dtype, (batch, time, _), keys = q.dtype, q.shape, k.shape[1]
    own = None if segments is None else segments[:, keys - time :]
    q, k, v = _by_head(q, num_heads, own), _by_head(k, num_heads, segments), _by_head(v, num_heads, segments)
    o, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:2])
    for rows, edge in _blocks(q, keys):
        scores = _scores(q, k, num_heads, rows, edge, segments)
        largest = scores.amax(-1, keepdim=True)
        exponentials = scores.sub_(largest).exp_()
        total = exponentials.sum(-1, keepdim=True)
        o[:, rows] = torch.bmm(exponentials, v[:, :edge]).div_(total)
        lse[:, rows] = (largest + total.log()).squeeze(-1)
    o, lse = _from_heads(o, num_heads, dtype), lse.view(batch, num_heads, time)
    if own is not None:
        o.masked_fill_((own < 0).unsqueeze(-1), 0)
        lse.masked_fill_((own < 0).unsqueeze(1), float("-inf"))
    return o, lse


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, num_heads: int, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, contiguous, in q's dtype.

    Args:
        do: [batch, time, r], o's gradient, any strides.
        q, k, v, num_heads, segments: what :func:`forward` was given.
        o, lse: what it returned.
    """
    dtype, keys = q.dtype, k.shape[1]
    own = None if segments is None else segments[:, keys - q.shape[1] :]
    do, q, o = (_by_head(t, num_heads, own) for t in (do, q, o))
    k, v = _by_head(k, num_heads, segments), _by_head(v, num_heads, segments)
    scale = q.shape[2] ** -0.5
    # Padding attends itself with a score of 0, and exp(0 - lse) would be inf: any finite lse does.
    lse = lse.masked_fill(lse == float("-inf"), 0).view(*q.shape[:2], 1)
    delta = (do * o).sum(-1, keepdim=True)
    dq = torch.empty_like(q)
    # Transposed: with keys as columns the library sums over the queries in several accumulators, which rounds less.
    dk, dv = (q.new_zeros(k.shape[0], k.shape[2], keys) for _ in range(2))
    for rows, edge in _blocks(q, keys):
        p = _scores(q, k, num_heads, rows, edge, segments).sub_(lse[:, rows]).exp_()
        dv[:, :, :edge].baddbmm_(do[:, rows].transpose(1, 2), p)
        ds = torch.bmm(do[:, rows], v[:, :edge].transpose(1, 2)).sub_(delta[:, rows]).mul_(p)
        dq[:, rows] = torch.bmm(ds, k[:, :edge])
        dk[:, :, :edge].baddbmm_(q[:, rows].transpose(1, 2), ds)
    dk, dv = dk.mul_(scale).transpose(1, 2), dv.transpose(1, 2)
    return (
        _from_heads(dq.mul_(scale), num_heads, dtype),
        _from_heads(dk, num_heads, dtype),
        _from_heads(dv, num_heads, dtype),
    )
