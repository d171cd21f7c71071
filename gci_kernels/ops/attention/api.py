"""The public attention and the checks of its arguments."""

import torch
from torch import Tensor

from gci_kernels.impl import check_impl
from gci_kernels.limits import MAX_HEAD_SIZE, MAX_RANK
from gci_kernels.ops.attention import reference
from gci_kernels.ops.attention.autograd import attention
from gci_kernels.ops.attention.plan import choose_attention
from gci_kernels.ops.attention.sequence import Sequence
from gci_kernels.ops.transforms import transformed


def low_rank_attention(
    q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, sequence: Sequence | None = None, impl: str = "auto"
) -> Tensor:
    """Causal multi-head attention in the rank-r space of a LoRA (ALoRA, arXiv 2405.17830).

    Per head of d = r / num_heads columns o = softmax(q @ k.T / sqrt(d)) @ v over the keys of the query's own sequence
    up to its own position. The queries are the last `time` of the keys. A position with nothing to attend (padding)
    gives exactly 0 and gradients of 0, whatever it holds.

    Differentiable in q, k and v. Sums are kept in float32, for float64 in float64. Memory grows with time + keys,
    except with "reference". Deterministic for a given number of threads. Second derivatives are computed from the
    formula, with all scores in memory; torch.jit.trace, torch.export, torch.func and forward-mode differentiation run
    the formula too, whatever `impl` says.

    Args:
        q: [batch, time, r], any floating dtype and device; r at most 256, r / num_heads at most 64. q, k and v may be
            column slices of one tensor: they are copied only where the last dimension has gaps ("aten" also where
            there are several batch rows, or a dtype narrower than the sums).
        k: [batch, keys, r] with keys >= time, in q's dtype and on its device.
        v: as k.
        num_heads: a divisor of r.
        sequence: what the rows are, on q's device, with past = keys - time; None: each row is one sequence.
        impl: "auto" (see choose_attention), "reference", "aten", "native" (C++) or "triton"; an explicit one that
            cannot run raises.

    Returns:
        [batch, time, r], q's dtype.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, what was given and what is allowed.
    """
    check_impl(impl)
    _check_tensors(q, k, v)
    check_heads(q.shape[2], num_heads)
    segments = check_sequence(sequence, q.shape[0], q.shape[1], k.shape[1] - q.shape[1], q.device)
    if impl == "reference" or transformed():
        return reference.forward(q, k, v, num_heads, segments)[0]
    tokens = q.shape[0] * q.shape[1]
    chosen = choose_attention(impl, tokens=tokens, dtype=q.dtype, device_type=q.device.type, device=q.device)
    return attention(q, k, v, num_heads, segments, chosen)[0]


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not q.dtype.is_floating_point:
        raise TypeError(f"q must be floating point, got {q.dtype}")
    if q.dim() != 3 or not 1 <= q.shape[2] <= MAX_RANK:
        raise ValueError(f"q must be [batch, time, r] with r from 1 to {MAX_RANK}, got {list(q.shape)}")
    batch, time, r = q.shape
    if k.dim() != 3 or k.shape[0] != batch or k.shape[1] < time or k.shape[2] != r:
        raise ValueError(f"k must be [{batch}, keys, {r}] with keys >= time={time}, got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must be {list(k.shape)} like k, got {list(v.shape)}")
    for name, value in (("k", k), ("v", v)):
        if value.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {value.device}")
        if value.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {value.dtype}")


def check_heads(r: int, num_heads: int) -> None:
    """Raise ValueError or TypeError unless a rank of `r` can be divided into `num_heads` heads."""
    if not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an integer, got {type(num_heads).__name__}")
    if r > MAX_RANK:
        raise ValueError(f"r must be at most {MAX_RANK}, got {r}")
    if num_heads < 1 or r % num_heads:
        raise ValueError(f"num_heads must divide r={r}, got {num_heads}")
    if r // num_heads > MAX_HEAD_SIZE:
        raise ValueError(f"num_heads must be at least {-(-r // MAX_HEAD_SIZE)} for r={r}, got {num_heads}")


def check_sequence(
    sequence: Sequence | None, batch: int, time: int, past: int, device: torch.device
) -> Tensor | None:  # fmt: skip
    """The segments of `sequence`: int32 [batch, past + time] on `device`, or None for one sequence a row.

    Raises:
        ValueError, TypeError: `sequence` describes other positions, or is no Sequence.
    """
    if sequence is None:
        return None
    if not isinstance(sequence, Sequence):
        raise TypeError(f"sequence must be a Sequence or None, got {type(sequence).__name__}")
    if sequence.past != past:
        raise ValueError(f"sequence.past must be keys - time = {past}, got {sequence.past}")
    segments = sequence.segments
    if segments is None:
        return None
    if tuple(segments.shape) != (batch, past + time):
        raise ValueError(f"sequence.segments must be {[batch, past + time]}, got {list(segments.shape)}")
    if segments.device != device:
        raise ValueError(f"sequence.segments must be on the device {device}, got {segments.device}")
    return segments
