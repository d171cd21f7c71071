"""The gate as Triton kernels, one pass each way, for GPU tensors.

A program holds whole tokens: a tile [tokens, experts] of logits, and tiles [tokens, experts, part of r] of the rest.
Blocks come from config.py; masks pad experts and r to powers of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gci_kernels.limits import MAX_EXPERTS
from gci_kernels.ops.gate import config
from gci_kernels.ops.launching import DTYPES, check_tensors


@triton.jit
def _gates(logits_ptr, in_t, e, row, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, stride_t, stride_c):
    """softmax of the TOP_K largest logits, float32 [tokens, experts]; 0 for the others."""
    in_e = e[None, :] < EXPERTS
    at = logits_ptr + row[:, None] * stride_t + e[None, :] * stride_c
    logits = tl.load(at, in_t[:, None] & in_e, 0.0).to(tl.float32)
    kept = in_e & in_t[:, None]
    if TOP_K < EXPERTS:
        # NaN counts as the largest, as in a sort: it is kept, and the sum makes every gate NaN.
        key = tl.where(logits == logits, logits, float("inf"))
        key = tl.where(in_e, key, float("-inf"))
        kept = kept & False
        for _ in range(TOP_K):
            best = tl.argmax(tl.where(kept, float("-inf"), key), axis=1, tie_break_left=True)
            kept = kept | (e[None, :] == best[:, None])
    logits = tl.where(in_e & kept, logits, float("-inf"))
    top = tl.max(logits, axis=1)
    # Rows past the last token keep nothing: without this guard -inf - -inf would give NaN.
    powers = tl.exp(logits - tl.where(in_t, top, 0.0)[:, None])
    return powers / tl.where(in_t, tl.sum(powers, axis=1), 1.0)[:, None]


@triton.jit
def _gate_fwd_kernel(
    projected_ptr, u_ptr, gates_ptr, tokens, stride_t, stride_c, scaling,
    EXPERTS: tl.constexpr, R: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    row, in_t = t.to(tl.int64), t < tokens
    gates = _gates(projected_ptr + EXPERTS * R * stride_c, in_t, e, row, EXPERTS, TOP_K, stride_t, stride_c)
    tl.store(gates_ptr + row[:, None] * EXPERTS + e[None, :], gates, in_t[:, None] & (e[None, :] < EXPERTS))
    factor = (scaling * gates)[:, :, None]
    row, in_te = row[:, None, None], (in_t[:, None] & (e[None, :] < EXPERTS))[:, :, None]
    for start in range(0, R, BLOCK_R):
        j = start + tl.arange(0, BLOCK_R)
        col, inside = (e[:, None] * R + j[None, :])[None, :, :], in_te & (j < R)[None, None, :]
        h = tl.load(projected_ptr + row * stride_t + col * stride_c, inside, 0.0).to(tl.float32)
        tl.store(u_ptr + row * (EXPERTS * R) + col, (factor * h).to(u_ptr.dtype.element_ty), inside)


def forward(
    projected: Tensor, num_experts: int, top_k: int, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """projected [tokens, num_experts*r + num_experts] -> u [tokens, num_experts*r] in `dtype`, gates in float32.

    Raises:
        ValueError: a tensor is not on a GPU, or of another dtype than bfloat16, float16 and float32; or there are more
            than 256 experts.
    """
    _check(num_experts, dtype, projected=projected)
    tokens, width = projected.shape[0], projected.shape[1] - num_experts
    u = projected.new_empty(tokens, width, dtype=dtype)
    gates = projected.new_empty(tokens, num_experts, dtype=torch.float32)
    if tokens:
        c = config.choose_gate_config(tokens, num_experts, width // num_experts)
        with torch.cuda.device_of(projected):
            _gate_fwd_kernel[(triton.cdiv(tokens, c.block_t),)](
                projected, u, gates, tokens, *projected.stride(), scaling,
                EXPERTS=num_experts, R=width // num_experts, TOP_K=top_k,
                BLOCK_T=c.block_t, BLOCK_E=c.block_e, BLOCK_R=c.block_r, num_warps=c.num_warps,
            )  # fmt: skip
    return u, gates


@triton.jit
def _gate_bwd_kernel(
    du_ptr, dgates_ptr, projected_ptr, dprojected_ptr, u_ptr, tokens,
    stride_dut, stride_duc, stride_gt, stride_ge, stride_t, stride_c, scaling, HAS_DGATES: tl.constexpr,
    EXPERTS: tl.constexpr, R: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The gates are made again from the logits; dh and u are written while dgates is summed, from one reading."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    row2, in_t = t.to(tl.int64)[:, None], t < tokens
    in_te = in_t[:, None] & (e[None, :] < EXPERTS)
    gates = _gates(projected_ptr + EXPERTS * R * stride_c, in_t, e, t.to(tl.int64), EXPERTS, TOP_K, stride_t, stride_c)
    factor, row = (scaling * gates)[:, :, None], row2[:, :, None]
    dgates = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(0, R, BLOCK_R):
        j = start + tl.arange(0, BLOCK_R)
        col, inside = (e[:, None] * R + j[None, :])[None, :, :], in_te[:, :, None] & (j < R)[None, None, :]
        h = tl.load(projected_ptr + row * stride_t + col * stride_c, inside, 0.0).to(tl.float32)
        du = tl.load(du_ptr + row * stride_dut + col * stride_duc, inside, 0.0).to(tl.float32)
        dgates += tl.sum(du * h, axis=2)
        tl.store(u_ptr + row * (EXPERTS * R) + col, (factor * h).to(u_ptr.dtype.element_ty), inside)
        dh = (factor * du).to(dprojected_ptr.dtype.element_ty)
        tl.store(dprojected_ptr + row * (EXPERTS * R + EXPERTS) + col, dh, inside)
    dgates *= scaling
    if HAS_DGATES:
        dgates += tl.load(dgates_ptr + row2 * stride_gt + e[None, :] * stride_ge, in_te, 0.0).to(tl.float32)
    dlogits = gates * (dgates - tl.sum(gates * dgates, axis=1)[:, None])
    dlogits_ptrs = dprojected_ptr + row2 * (EXPERTS * R + EXPERTS) + EXPERTS * R + e[None, :]
    tl.store(dlogits_ptrs, dlogits.to(dprojected_ptr.dtype.element_ty), in_te)


def backward(
    du: Tensor, dgates: Tensor | None, projected: Tensor, num_experts: int, top_k: int, scaling: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dprojected and u in `dtype` for du [tokens, num_experts*r] and dgates [tokens, num_experts] or None.

    Errors are those of :func:`forward`.
    """
    _check(num_experts, dtype, du=du, dgates=dgates, projected=projected)
    tokens, width = du.shape
    u = projected.new_empty(tokens, width, dtype=dtype)
    dprojected = projected.new_empty(tokens, width + num_experts, dtype=dtype)
    if tokens:
        c = config.choose_gate_config(tokens, num_experts, width // num_experts)
        loaded = du if dgates is None else dgates  # without dgates a placeholder, which is not read
        with torch.cuda.device_of(projected):
            _gate_bwd_kernel[(triton.cdiv(tokens, c.block_t),)](
                du, loaded, projected, dprojected, u, tokens,
                *du.stride(), *loaded.stride(), *projected.stride(), scaling, HAS_DGATES=dgates is not None,
                EXPERTS=num_experts, R=width // num_experts, TOP_K=top_k,
                BLOCK_T=c.block_t, BLOCK_E=c.block_e, BLOCK_R=c.block_r, num_warps=c.num_warps,
            )  # fmt: skip
    return dprojected, u


def _check(num_experts: int, dtype: torch.dtype, **tensors: Tensor | None) -> None:
    check_tensors(**tensors)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {str(dtype).removeprefix('torch.')}")
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"num_experts must be at most {MAX_EXPERTS} for the Triton gate, got {num_experts}")
