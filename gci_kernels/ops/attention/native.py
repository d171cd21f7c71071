"""The attention in C++ (csrc/cpu/attention.cpp): CPU tensors in float32, bfloat16 or float64; memory linear in time."""

import torch
from torch import Tensor

from gci_kernels.native import DTYPE_CODES, extension

# Pairs of query and key, over all heads, below which starting a second thread costs more time than it saves.
_ONE_THREAD_BELOW = 2**14


def _dense_rows(t: Tensor) -> Tensor:
    """t [batch, rows, r], copied only if its last dimension is not contiguous."""
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()


def _rows(t: Tensor) -> tuple[int, int, int]:
    """What the kernels take for a tensor [batch, rows, r]: its address and its two strides."""
    return t.data_ptr(), t.stride(0), t.stride(1)


def _schedule(heads: int, time: int, keys: int) -> tuple[int, int]:
    """The number of threads, and the number of parts of each head, so that the threads share the work evenly."""
    threads = torch.get_num_threads() if heads * time * keys > _ONE_THREAD_BELOW else 1
    parts = next(p for p in range(1, threads + 1) if heads * p % threads == 0 or heads * p >= 4 * threads)
    return threads, max(min(parts, -(-time // extension().attention_block_queries)), 1)


def _workspace(panels: int, keys: int, d: int, dtype: torch.dtype) -> Tensor:
    """Memory for k and v of one head, `panels` times, with keys rounded up to whole blocks."""
    block = extension().attention_block_keys
    return torch.empty(panels * -(-keys // block) * block * 2 * d, dtype=dtype)


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
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    (batch, time, _), keys, d = q.shape, k.shape[1], q.shape[2] // num_heads
    segments = None if segments is None else segments.contiguous()
    o = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(batch, num_heads, time, dtype=torch.promote_types(q.dtype, torch.float32))
    threads, parts = _schedule(batch * num_heads, time, keys)
    workspace = _workspace(threads, keys, d, lse.dtype)
    extension().attention_forward(
        _rows(q), _rows(k), _rows(v), 0 if segments is None else segments.data_ptr(), DTYPE_CODES[q.dtype],
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
    do, q, k, v, o = (_dense_rows(t) for t in (do, q, k, v, o))
    (batch, time, _), keys, d = q.shape, k.shape[1], q.shape[2] // num_heads
    segments, lse = None if segments is None else segments.contiguous(), lse.contiguous()
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
    threads, parts = _schedule(batch * num_heads, time, keys)
    panels = threads + (threads if parts == 1 else batch * num_heads * parts)
    workspace = _workspace(panels, keys, d, lse.dtype)
    extension().attention_backward(
        _rows(q), _rows(k), _rows(v), 0 if segments is None else segments.data_ptr(), DTYPE_CODES[q.dtype],
        (batch, time, keys), (num_heads, d, parts), _rows(o), _rows(do), lse.data_ptr(),
        dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), workspace.data_ptr(), threads,
    )  # fmt: skip
    return dq, dk, dv
