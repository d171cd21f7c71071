"""The attention as Triton kernels, for GPU tensors: flash attention for tiny heads.

A program has one head, padded with zeros to 16 columns, the least that matrix units take. The padding costs no time,
which exponentials dominate: on an H100's multiprocessor, a pair of positions takes 1/16 of a clock for its exponential
and 1/256 for a product of 16 columns. A tile with the scores of all heads would not read less: it holds fewer queries.

Scores of narrow dtypes are in units of log2: one fused multiply-add makes the exponent for exp2. In float32 q is scaled
instead, so that the largest score minus itself is exactly 0. Only tiles on the diagonal, or of several segments, apply
a mask. No sum is shared by programs: the same call gives the same bits, in any batch. Row offsets are int64. Blocks
come from config.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gci_kernels.hardware import gpus
from gci_kernels.limits import MAX_HEAD_SIZE
from gci_kernels.ops.attention import config
from gci_kernels.ops.launching import check_tensors

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _at(ptr, b, row, first_col, stride_b, stride_t, stride_c, BLOCK_D: tl.constexpr):
    """Pointers to BLOCK_D columns of rows of sequence b."""
    col = first_col + tl.arange(0, BLOCK_D)
    ptr += tl.cast(b, tl.int64) * stride_b
    return ptr + row.to(tl.int64)[:, None] * stride_t + col.to(tl.int64)[None, :] * stride_c


@triton.jit
def _bounds(segments_ptr, start, begin, end, keys, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Where in [begin, end) the segments of positions [start, start + SIZE) lie.

    first, stop: outside [first, stop), nothing is of these segments. clear, until: if they are one segment, all of
    [clear, start) and of [start + SIZE, until) is of it too; otherwise both are empty.
    """
    at = start + tl.arange(0, SIZE)
    ids = tl.load(segments_ptr + at, at < keys, -1)
    highest = tl.max(ids, axis=0)
    lowest = tl.min(tl.where(ids < 0, 2147483647, ids), axis=0)
    single = (tl.min(tl.where(at < keys, ids, highest), axis=0) == highest) & (highest >= 0)
    at = begin + tl.arange(0, CHUNK)
    first, until = tl.full((CHUNK,), end, tl.int32), tl.full((CHUNK,), end, tl.int32)
    stop, clear = tl.full((CHUNK,), begin, tl.int32), tl.full((CHUNK,), begin, tl.int32)
    for _ in range(begin, end, CHUNK):
        others = tl.load(segments_ptr + at, at < end, -1)
        # Between the lowest and the highest: more than the segments themselves where ids are in no order.
        found = (others >= lowest) & (others <= highest)
        first = tl.minimum(first, tl.where(found, at, first))
        stop = tl.maximum(stop, tl.where(found, at + 1, stop))
        strange = (others != highest) | (single == 0)
        clear = tl.maximum(clear, tl.where(strange & (at < start), at + 1, clear))
        until = tl.minimum(until, tl.where(strange & (at >= start), at, until))
        at += CHUNK
    return tl.min(first, axis=0), tl.max(stop, axis=0), tl.max(clear, axis=0), tl.min(until, axis=0)


@triton.jit
def _full_tiles(first, end, clear, until, BLOCK: tl.constexpr):
    """Of the tiles of BLOCK positions from first to end, how many lie before, within and behind [clear, until)."""
    before = tl.maximum(tl.cdiv(clear - first, BLOCK), 0)
    within = tl.maximum((until - first) // BLOCK - before, 0)
    return before, within, tl.cdiv(end - first, BLOCK) - before - within


@triton.jit
def _power(exponents, EXACT: tl.constexpr):
    """e, or 2 if not EXACT, to the exponents, of which none is above 0 but by an error of rounding."""
    return tl.exp(tl.where(exponents > 0, 0.0, exponents)) if EXACT else tl.exp2(exponents)  # NaN stays NaN


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, segments_ptr, o_ptr, lse_ptr, sequences, time, keys, num_heads, scale,
    stride_qb, stride_qt, stride_qc, stride_kb, stride_kt, stride_kc, stride_vb, stride_vt, stride_vc,
    HAS_SEGMENTS: tl.constexpr, D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # The last queries have the most keys: their programs start first, so that the short ones fill the gaps.
    pid = tl.program_id(0)
    start = (tl.cdiv(time, BLOCK_T) - 1 - pid // sequences) * BLOCK_T
    sequence = pid % sequences
    b, head = sequence // num_heads, sequence % num_heads
    t, n, d, past = start + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D), keys - time
    in_d, known = d[None, :] < D, t < time
    first, clear, end = 0, 0, tl.minimum(past + start + BLOCK_T, keys)
    if HAS_SEGMENTS:
        segments_ptr += tl.cast(b, tl.int64) * keys
        ids = tl.load(segments_ptr + past + t, known, -1)
        known = ids >= 0
        ids = tl.where(known, ids, -2)  # padding is equal to nothing, not to itself
        first, _, clear, _ = _bounds(segments_ptr, past + start, 0, end, keys, BLOCK_T, CHUNK)
    q = tl.load(_at(q_ptr, b, t, head * D, stride_qb, stride_qt, stride_qc, BLOCK_D), known[:, None] & in_d, 0.0)
    k_ptrs = _at(k_ptr, b, n, head * D, stride_kb, stride_kt, stride_kc, BLOCK_D)
    v_ptrs = _at(v_ptr, b, n, head * D, stride_vb, stride_vt, stride_vc, BLOCK_D)
    EXACT: tl.constexpr = q.dtype == tl.float32
    if EXACT:
        q, scale = q * scale, 1.0
    else:
        scale *= _LOG2_E
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    before, full, behind = _full_tiles(first, end, clear, past + start + 1, BLOCK_K)
    for MASKED in tl.static_range(2):
        for i in range(before + behind if MASKED else full):
            at = first + (tl.where(i < before, i, i + full) if MASKED else i + before) * BLOCK_K
            inside = n < keys - at
            if MASKED and HAS_SEGMENTS:
                others = tl.load(segments_ptr + tl.minimum(at + n, keys - 1))
                inside &= others >= 0  # 0 * NaN would be NaN: what padding holds is not read
            inside = inside[:, None] & in_d
            k = tl.load(k_ptrs + at.to(tl.int64) * stride_kt, inside, 0.0)
            v = tl.load(v_ptrs + at.to(tl.int64) * stride_vt, inside, 0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if MASKED:
                kept = n[None, :] <= (past + t - at)[:, None]
                if HAS_SEGMENTS:
                    kept &= tl.maximum(others, -1)[None, :] == ids[:, None]
                scores = tl.where(kept, scores, float("-inf"))
            highest = tl.maximum(top, tl.max(scores, axis=1) * scale)
            # A row that has seen no key yet: -inf - -inf would be NaN.
            shift = tl.where(highest == float("-inf"), 0.0, highest)
            powers = _power(scores * scale - shift[:, None], EXACT)
            shrink = _power(top - shift, EXACT)
            total = total * shrink + tl.sum(powers, axis=1)
            acc = tl.dot(powers.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            top = highest
    o = acc / tl.where(total == 0, 1.0, total)[:, None]
    o_ptrs = _at(o_ptr, b, t, head * D, tl.cast(time, tl.int64) * num_heads * D, num_heads * D, 1, BLOCK_D)
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), (t[:, None] < time) & in_d)
    lse = top + tl.log(total) if EXACT else (top + tl.log2(total)) * _LN_2
    tl.store(lse_ptr + tl.cast(sequence, tl.int64) * time + t, lse, t < time)


def forward(q: Tensor, k: Tensor, v: Tensor, num_heads: int, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """q [batch, time, r], k and v [batch, keys, r], segments int32 [batch, keys] -> o like q, lse [batch, heads, time].

    bfloat16, float16 or float32 on a GPU; lse in float32. Rows may have gaps.

    Raises:
        ValueError: a tensor is on another device, or of another dtype, or a head has more than 64 columns.
    """
    _check(num_heads, segments, q=q, k=k, v=v)
    (batch, time, r), keys = q.shape, k.shape[1]
    o = q.new_empty(batch, time, r)
    lse = q.new_empty(batch, num_heads, time, dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    c, sequences, d = _config(q, num_heads), batch * num_heads, r // num_heads
    ids = k if segments is None else segments.contiguous()  # k: never loaded
    with torch.cuda.device_of(q):
        _attention_fwd_kernel[(triton.cdiv(time, c.fwd.block_t) * sequences,)](
            q, k, v, ids, o, lse, sequences, time, keys, num_heads, d**-0.5,
            *q.stride(), *k.stride(), *v.stride(), HAS_SEGMENTS=segments is not None, D=d,
            BLOCK_T=c.fwd.block_t, BLOCK_K=c.fwd.block_k, BLOCK_D=c.block_d, CHUNK=c.chunk,
            num_warps=c.fwd.num_warps, num_stages=c.fwd.num_stages,
        )  # fmt: skip
    return o, lse


@triton.jit
def _attention_bwd_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, segments_ptr, o_ptr, lse_ptr, dq_ptr, shift_ptr, delta_ptr,
    sequences, time, keys, num_heads, scale,
    stride_dob, stride_dot, stride_doc, stride_qb, stride_qt, stride_qc, stride_kb, stride_kt, stride_kc,
    stride_vb, stride_vt, stride_vc, stride_ob, stride_ot, stride_oc,
    HAS_SEGMENTS: tl.constexpr, D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dq; and shift, delta [sequences, time] float32, what the other kernel needs to know of each query."""
    pid = tl.program_id(0)
    start = (tl.cdiv(time, BLOCK_T) - 1 - pid // sequences) * BLOCK_T
    sequence = pid % sequences
    b, head = sequence // num_heads, sequence % num_heads
    t, n, d, past = start + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D), keys - time
    in_d, known = d[None, :] < D, t < time
    first, clear, end = 0, 0, tl.minimum(past + start + BLOCK_T, keys)
    if HAS_SEGMENTS:
        segments_ptr += tl.cast(b, tl.int64) * keys
        ids = tl.load(segments_ptr + past + t, known, -1)
        known = ids >= 0
        ids = tl.where(known, ids, -2)
        first, _, clear, _ = _bounds(segments_ptr, past + start, 0, end, keys, BLOCK_T, CHUNK)
    q = tl.load(_at(q_ptr, b, t, head * D, stride_qb, stride_qt, stride_qc, BLOCK_D), known[:, None] & in_d, 0.0)
    do = tl.load(_at(do_ptr, b, t, head * D, stride_dob, stride_dot, stride_doc, BLOCK_D), known[:, None] & in_d, 0.0)
    o = tl.load(_at(o_ptr, b, t, head * D, stride_ob, stride_ot, stride_oc, BLOCK_D), known[:, None] & in_d, 0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    row = tl.cast(sequence, tl.int64) * time + t
    lse = tl.load(lse_ptr + row, t < time, float("inf"))
    # Where nothing is attended, exp2(score - inf) makes the 0 that exp2(score + inf) would not.
    EXACT: tl.constexpr = q.dtype == tl.float32
    shift = tl.where(lse == float("-inf"), float("inf"), lse if EXACT else lse * _LOG2_E)
    tl.store(shift_ptr + row, shift, t < time)
    tl.store(delta_ptr + row, delta, t < time)
    k_ptrs = _at(k_ptr, b, n, head * D, stride_kb, stride_kt, stride_kc, BLOCK_D)
    v_ptrs = _at(v_ptr, b, n, head * D, stride_vb, stride_vt, stride_vc, BLOCK_D)
    if EXACT:
        q, factor = q * scale, 1.0
    else:
        factor = scale * _LOG2_E
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    before, full, behind = _full_tiles(first, end, clear, past + start + 1, BLOCK_K)
    for MASKED in tl.static_range(2):
        for i in range(before + behind if MASKED else full):
            at = first + (tl.where(i < before, i, i + full) if MASKED else i + before) * BLOCK_K
            inside = n < keys - at
            if MASKED and HAS_SEGMENTS:
                others = tl.load(segments_ptr + tl.minimum(at + n, keys - 1))
                inside &= others >= 0  # 0 * NaN would be NaN: what padding holds is not read
            inside = inside[:, None] & in_d
            k = tl.load(k_ptrs + at.to(tl.int64) * stride_kt, inside, 0.0)
            v = tl.load(v_ptrs + at.to(tl.int64) * stride_vt, inside, 0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            powers = _power(scores * factor - shift[:, None], EXACT)
            if MASKED:
                kept = n[None, :] <= (past + t - at)[:, None]
                if HAS_SEGMENTS:
                    kept &= tl.maximum(others, -1)[None, :] == ids[:, None]
                powers = tl.where(kept, powers, 0.0)
            dpowers = tl.dot(do, tl.trans(v), input_precision="ieee")
            dscores = powers * (dpowers - delta[:, None])
            acc = tl.dot(dscores.to(k.dtype), k, acc, input_precision="ieee")
    dq_ptrs = _at(dq_ptr, b, t, head * D, tl.cast(time, tl.int64) * num_heads * D, num_heads * D, 1, BLOCK_D)
    tl.store(dq_ptrs, (acc * scale).to(dq_ptr.dtype.element_ty), (t[:, None] < time) & in_d)


@triton.jit
def _attention_bwd_dkv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, segments_ptr, shift_ptr, delta_ptr, dk_ptr, dv_ptr,
    sequences, time, keys, num_heads, scale,
    stride_dob, stride_dot, stride_doc, stride_qb, stride_qt, stride_qc, stride_kb, stride_kt, stride_kc,
    stride_vb, stride_vt, stride_vc,
    HAS_SEGMENTS: tl.constexpr, D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Keys make the rows of a tile and queries its columns, so that it is a product's left side as it stands."""
    pid = tl.program_id(0)
    start = pid // sequences * BLOCK_K  # the first keys have the most queries
    sequence = pid % sequences
    b, head = sequence // num_heads, sequence % num_heads
    n, t, d, past = start + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), keys - time
    in_d, known = d[None, :] < D, n < keys
    first, end, until = tl.maximum(start - past, 0), time, time
    if HAS_SEGMENTS:
        segments_ptr += tl.cast(b, tl.int64) * keys
        ids = tl.load(segments_ptr + n, known, -1)
        known = ids >= 0
        ids = tl.where(known, ids, -2)
        _, stop, _, until = _bounds(segments_ptr, start, start, keys, keys, BLOCK_K, CHUNK)
        end, until = stop - past, until - past
    k = tl.load(_at(k_ptr, b, n, head * D, stride_kb, stride_kt, stride_kc, BLOCK_D), known[:, None] & in_d, 0.0)
    v = tl.load(_at(v_ptr, b, n, head * D, stride_vb, stride_vt, stride_vc, BLOCK_D), known[:, None] & in_d, 0.0)
    q_ptrs = _at(q_ptr, b, t, head * D, stride_qb, stride_qt, stride_qc, BLOCK_D)
    do_ptrs = _at(do_ptr, b, t, head * D, stride_dob, stride_dot, stride_doc, BLOCK_D)
    row = tl.cast(sequence, tl.int64) * time + t
    EXACT: tl.constexpr = k.dtype == tl.float32
    factor = 1.0 if EXACT else scale * _LOG2_E
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    before, full, behind = _full_tiles(first, end, start + BLOCK_K - 1 - past, until, BLOCK_T)
    for MASKED in tl.static_range(2):
        for i in range(before + behind if MASKED else full):
            at = first + (tl.where(i < before, i, i + full) if MASKED else i + before) * BLOCK_T
            inside = t < time - at
            if MASKED and HAS_SEGMENTS:
                others = tl.load(segments_ptr + tl.minimum(past + at + t, keys - 1))
                inside &= others >= 0
            q = tl.load(q_ptrs + at.to(tl.int64) * stride_qt, inside[:, None] & in_d, 0.0)
            do = tl.load(do_ptrs + at.to(tl.int64) * stride_dot, inside[:, None] & in_d, 0.0)
            shift = tl.load(shift_ptr + row + at, inside, 0.0)
            delta = tl.load(delta_ptr + row + at, inside, 0.0)
            if EXACT:
                q *= scale
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")
            powers = _power(scores * factor - shift[None, :], EXACT)
            if MASKED:
                kept = (n - past - at)[:, None] <= t[None, :]
                if HAS_SEGMENTS:
                    kept &= ids[:, None] == tl.maximum(others, -1)[None, :]
                powers = tl.where(kept, powers, 0.0)
            dv = tl.dot(powers.to(do.dtype), do, dv, input_precision="ieee")
            dpowers = tl.dot(v, tl.trans(do), input_precision="ieee")
            dscores = powers * (dpowers - delta[None, :])
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    width = num_heads * D
    dk_ptrs = _at(dk_ptr, b, n, head * D, tl.cast(keys, tl.int64) * width, width, 1, BLOCK_D)
    dv_ptrs = _at(dv_ptr, b, n, head * D, tl.cast(keys, tl.int64) * width, width, 1, BLOCK_D)
    tl.store(dk_ptrs, (dk if EXACT else dk * scale).to(dk_ptr.dtype.element_ty), (n[:, None] < keys) & in_d)
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), (n[:, None] < keys) & in_d)


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, num_heads: int, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, without gaps, for the gradient do of o and what :func:`forward` returned; errors as there."""
    _check(num_heads, segments, q=q, k=k, v=v, do=do, o=o)
    check_tensors((torch.float32,), lse=lse)
    (batch, time, r), keys = q.shape, k.shape[1]
    dq, dk, dv = q.new_empty(batch, time, r), q.new_empty(batch, keys, r), q.new_empty(batch, keys, r)
    if dq.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    c, sequences, d, lse = _config(q, num_heads), batch * num_heads, r // num_heads, lse.contiguous()
    ids = k if segments is None else segments.contiguous()  # k: never loaded
    shift, delta = torch.empty_like(lse), torch.empty_like(lse)
    sizes, strides = (sequences, time, keys, num_heads, d**-0.5), (*do.stride(), *q.stride(), *k.stride(), *v.stride())
    with torch.cuda.device_of(q):
        _attention_bwd_dq_kernel[(triton.cdiv(time, c.dq.block_t) * sequences,)](
            do, q, k, v, ids, o, lse, dq, shift, delta, *sizes,
            *strides, *o.stride(), HAS_SEGMENTS=segments is not None, D=d,
            BLOCK_T=c.dq.block_t, BLOCK_K=c.dq.block_k, BLOCK_D=c.block_d, CHUNK=c.chunk,
            num_warps=c.dq.num_warps, num_stages=c.dq.num_stages,
        )  # fmt: skip
        _attention_bwd_dkv_kernel[(triton.cdiv(keys, c.dkv.block_k) * sequences,)](
            do, q, k, v, ids, shift, delta, dk, dv, *sizes,
            *strides, HAS_SEGMENTS=segments is not None, D=d,
            BLOCK_T=c.dkv.block_t, BLOCK_K=c.dkv.block_k, BLOCK_D=c.block_d, CHUNK=c.chunk,
            num_warps=c.dkv.num_warps, num_stages=c.dkv.num_stages,
        )  # fmt: skip
    return dq, dk, dv


def _config(q: Tensor, num_heads: int) -> config.AttentionConfig:
    capability = gpus.device_capability(q.device)
    return config.choose_attention_config(q.shape[2], num_heads, q.dtype, capability)


def _check(num_heads: int, segments: Tensor | None, q: Tensor, **others: Tensor) -> None:
    check_tensors(q=q)
    check_tensors((q.dtype,), **others)
    check_tensors((torch.int32,), segments=segments)
    if q.shape[2] > MAX_HEAD_SIZE * num_heads:
        raise ValueError(
            f"num_heads must leave heads of at most {MAX_HEAD_SIZE} columns for the Triton attention, got {num_heads} "
            f"heads of {q.shape[2] // num_heads}"
        )
