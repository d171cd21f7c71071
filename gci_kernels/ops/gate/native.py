"""The gate in C++ (csrc/cpu/gate.cpp) for CPU tensors in float32, bfloat16 or float64; one pass over them each way."""

import torch
from torch import Tensor

from gci_kernels.native import DTYPE_CODES, extension


def forward(
    projected: Tensor, num_experts: int, top_k: int, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """u = scaling * gates * h, and the gates.

    Args:
        projected: [tokens, num_experts*r + num_experts], rows contiguous.
        num_experts: at least 1.
        top_k: how many gates of a token are kept, at most num_experts.
        scaling: the adapter's factor.
        dtype: of u.

    Returns:
        u [tokens, num_experts*r] in `dtype`; gates [tokens, num_experts] in float32, float64 where `dtype` is.
    """
    tokens, width = projected.shape[0], projected.shape[1] - num_experts
    u = torch.empty(tokens, width, dtype=dtype)
    gates = torch.empty(tokens, num_experts, dtype=torch.promote_types(dtype, torch.float32))
    extension().gate_forward(
        projected.data_ptr(), projected.stride(0), DTYPE_CODES[projected.dtype], DTYPE_CODES[dtype],
        tokens, num_experts, width // num_experts, top_k, scaling,
        u.data_ptr(), gates.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return u, gates


def backward(
    du: Tensor, dgates: Tensor | None, projected: Tensor, num_experts: int, top_k: int, scaling: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of `projected`, in `dtype`, and u recomputed.

    Args:
        du: [tokens, num_experts*r], u's gradient.
        dgates: [tokens, num_experts] in the gates' dtype, or None for zeros.
        projected, num_experts, top_k, scaling, dtype: what :func:`forward` was given.
    """
    tokens, width = du.shape
    du, dgates = du.to(projected.dtype).contiguous(), None if dgates is None else dgates.contiguous()
    u = torch.empty(tokens, width, dtype=dtype)
    dprojected = torch.empty(tokens, width + num_experts, dtype=dtype)
    extension().gate_backward(
        projected.data_ptr(), projected.stride(0), DTYPE_CODES[projected.dtype], DTYPE_CODES[dtype],
        tokens, num_experts, width // num_experts, top_k, scaling,
        du.data_ptr(), 0 if dgates is None else dgates.data_ptr(), u.data_ptr(), dprojected.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return dprojected, u
