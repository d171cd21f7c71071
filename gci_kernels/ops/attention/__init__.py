"""ALoRA's mixer: causal multi-head attention over a sequence, in the rank-r space of a LoRA (arXiv 2405.17830).

q [batch, time, r], k and v [batch, keys, r] with keys >= time: query i stands at key position past + i, past = keys -
time. It attends key j where j <= past + i and segments[b, j] == segments[b, past + i] >= 0. Head h owns columns h*d to
(h+1)*d, d = r // num_heads; scores are scaled by 1/sqrt(d). Each implementation is a module with

    forward(q, k, v, num_heads, segments) -> o, lse
    backward(do, q, k, v, o, lse, num_heads, segments) -> dq, dk, dv

segments int32 [batch, keys], negative for padding, or None: one sequence a row, nothing padded. lse [batch, num_heads,
time] is the logarithm of the softmax's sum, in float32, or float64 where q is; sums are kept in the same. o and the
gradients in q's dtype, without gaps; rows of q, k, v and do may have gaps. Padding has o = 0, lse = -inf and gradients
of 0, and what its q, k, v and do hold, NaN too, reaches nothing else.
"""

from gci_kernels.ops.attention import kernels as kernels
from gci_kernels.ops.attention.api import low_rank_attention
from gci_kernels.ops.attention.sequence import Sequence

__all__ = ["Sequence", "low_rank_attention"]
