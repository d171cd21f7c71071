"""ALoRA's mixer: causal multi-head attention over a sequence, in the rank-r space of a LoRA (arXiv 2405.17830).

q is [batch, time, r]; k and v are [batch, keys, r] with keys >= time. Query i stands at key position past + i, where
past = keys - time. It attends key j if j <= past + i and segments[b, j] == segments[b, past + i] >= 0. Head h owns the
columns h*d to (h+1)*d, d = r // num_heads; scores are scaled by 1/sqrt(d).

aten.py, native.py (C++) and triton.py each have

    forward(q, k, v, num_heads, segments) -> o, lse
    backward(do, q, k, v, o, lse, num_heads, segments) -> dq, dk, dv

with the same results: o and the gradients contiguous in q's dtype, lse in float32, or float64 where q is. Padding has
o = 0, lse = -inf and gradients of 0, and whatever its q, k, v and do hold, NaN too, reaches nothing else. reference.py
is the formula; it has forward alone, which autograd can differentiate.
"""

from gci_kernels.ops.attention import kernels as kernels
from gci_kernels.ops.attention.api import low_rank_attention
from gci_kernels.ops.attention.plan import choose_attention
from gci_kernels.ops.attention.sequence import Sequence

__all__ = ["Sequence", "choose_attention", "low_rank_attention"]
