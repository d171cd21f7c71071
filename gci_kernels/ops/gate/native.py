"""The gate in C++ (csrc/cpu/gate.cpp), one pass each way, for CPU tensors (signatures: the package's docstring)."""

import torch
from torch import Tensor

from gci_kernels.native import DTYPE_CODES, extension


def forward(
    projected: Tensor, num_experts: int, top_k: int, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
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
