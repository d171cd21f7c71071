"""The attention in C++ (csrc/cpu/attention.cpp): CPU tensors in float32, bfloat16 or float64; memory linear in time."""

from typing import Any

import torch
from torch import Tensor

from gci_kernels.native import DTYPE_CODES, extension

# Pairs of query and key, over all heads, below which starting a second thread costs more time than it saves.
_ONE_THREAD_BELOW = 2**14


def _by_rows(*tensors: Tensor) -> tuple[list[Tensor], list[tuple[int, int, int]]]:
    """Tensors [batch, rows, r], copied if their last dimension is not contiguous; their addresses and two strides."""
    dense = [t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous() for t in tensors]
    return dense, [(t.data_ptr(), t.stride(0), t.stride(1)) for t in dense]


def _schedule(native: Any, heads: int, time: int, keys: int) -> tuple[int, int, int]:
    """How many threads run; in how many parts each head is cut, so that they share the work evenly; keys padded."""
    threads = torch.get_num_threads() if heads * time * keys > _ONE_THREAD_BELOW else 1
    parts = next(p for p in range(1, threads + 1) if heads * p % threads == 0 or heads * p >= 4 * threads)
    block = native.attention_block_keys
    return threads, max(min(parts, -(-time // native.attention_block_queries)), 1), -(-keys // block) * block


def forward(q: Tensor, k: Tensor, v: Tensor, num_heads: int, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """The attention's output and the logarithm of each query's softmax sum.

    Args:
        q: [batch, time, r], any strides; copied if its last dimension is not contiguous, as k and v are.
        k, v: [batch, keys, r] with keys >= time, like q.
        num_heads: a divisor of r.
        segments: int32 [batch, keys], negative for padding; None: each row is one sequence without padding.

    Returns:
        o [batch, time, r], contiguous, in q's dtype; lse [batch, num_heads, time] in float32, float64 where q is.
    """
    native = extension()
    (q, k, v), addresses = _by_rows(q, k, v)
    (batch, time, _), keys, d = q.shape, k.shape[1], q.shape[2] // num_heads
    segments = None if segments is None else segments.contiguous()
    o = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(batch, num_heads, time, dtype=torch.promote_types(q.dtype, torch.float32))
    threads, parts, padded = _schedule(native, batch * num_heads, time, keys)
    workspace = torch.empty(threads * padded * 2 * d, dtype=lse.dtype)  # for each thread k and v of one head
    native.attention_forward(
        *addresses, 0 if segments is None else segments.data_ptr(), DTYPE_CODES[q.dtype],
        (batch, time, keys), (num_heads, d, parts), o.data_ptr(), lse.data_ptr(),
        workspace.data_ptr(), threads,
    )  # fmt: skip
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
    native = extension()
    (q, k, v, o, do), addresses = _by_rows(q, k, v, o, do)
    (batch, time, _), keys, d = q.shape, k.shape[1], q.shape[2] // num_heads
    segments, lse = None if segments is None else segments.contiguous(), lse.contiguous()
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
    threads, parts, padded = _schedule(native, batch * num_heads, time, keys)
    panels = threads + (threads if parts == 1 else batch * num_heads * parts)
    workspace = torch.empty(panels * padded * 2 * d, dtype=lse.dtype)
    native.attention_backward(
        *addresses[:3], 0 if segments is None else segments.data_ptr(), DTYPE_CODES[q.dtype],
        (batch, time, keys), (num_heads, d, parts), *addresses[3:], lse.data_ptr(),
        dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), workspace.data_ptr(), threads,
    )  # fmt: skip
    return dq, dk, dv
