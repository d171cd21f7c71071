"""The stages in C++ (csrc/cpu/skinny*.cpp, dropout.cpp): CPU tensors; the products for float32 and bfloat16.

Same functions as aten.py, but expand is for bfloat16 alone (in float32 the library hides it in the base product), and
project and reduce return float32 sums of bfloat16 operands, unrounded. Rows of x, y and u are contiguous: the caller
sees to it. Kernels take addresses, so sizes that do not fit each other are refused here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gci_kernels.native import DTYPE_CODES, extension
from gci_kernels.ops.bottleneck.aten import expand_onto  # noqa: F401  # behind dropout the library adds


def _is_half(x: Tensor) -> bool:
    """Whether x takes the bfloat16 kernels; RuntimeError where a plan names them on a processor without them."""
    if x.dtype == torch.bfloat16 and not extension().has_bf16_products():
        raise RuntimeError("the plan wants bfloat16 products in C++, which need a processor with AVX512_BF16")
    return x.dtype == torch.bfloat16


def _padded(width: int) -> int:
    """Columns of a packed panel."""
    unit = extension().skinny_padding
    return -(-width // unit) * unit


def _pairs(m: Tensor) -> Tensor:
    """m [depth, width] as the bfloat16 kernels read it: in pairs of rows, padded to a vector."""
    (depth, width), lib = m.shape, extension()
    m = m if m.dtype in (torch.float32, torch.bfloat16) else m.float()
    panel = torch.empty((depth + 1) // 2, _padded(width), 2, dtype=torch.bfloat16)
    lib.pack_pairs(m.data_ptr(), DTYPE_CODES[m.dtype], *m.stride(), panel.data_ptr(), depth, width)
    return panel


def _misfit(left: Tensor, right: Tensor) -> ValueError:
    return ValueError(f"the operands of a product do not fit each other: {list(left.shape)} and {list(right.shape)}")


def project(x: Tensor, m: Tensor) -> Tensor:
    """x [tokens, depth] @ m [depth, width], float32 or bfloat16 x, any floating m -> float32 [tokens, width]."""
    (tokens, depth), width, lib, threads = x.shape, m.shape[1], extension(), torch.get_num_threads()
    if m.shape[0] != depth:
        raise _misfit(x, m)
    out = torch.empty(tokens, width)
    if _is_half(x):
        panel = _pairs(m)
        lib.project_bf16(
            x.data_ptr(), x.stride(0), panel.data_ptr(), out.data_ptr(), width, tokens, depth, width, threads
        )
    else:
        m, panel = m.float(), torch.empty(depth, _padded(width))
        lib.project(
            x.data_ptr(), x.stride(0), m.data_ptr(), *m.stride(), panel.data_ptr(), out.data_ptr(), width,
            tokens, depth, width, threads,
        )  # fmt: skip
    return out


def expand(u: Tensor, m: Tensor, x: Tensor, w: Tensor | None, bias: Tensor | None) -> Tensor:
    """u [tokens, rank] @ m [rank, width] + x [tokens, depth] @ w [depth, width] + bias, bfloat16 u, x, w and bias."""
    if w is None:
        return torch.mm(u, m.to(u.dtype))
    y, panel, (rank, width) = F.linear(x, w.t(), bias), _pairs(m), m.shape
    if u.shape[1] != rank or y.shape != (u.shape[0], width):
        raise _misfit(u, m)
    extension().expand_bf16(
        u.data_ptr(), u.stride(0), panel.data_ptr(), y.data_ptr(), y.stride(0),
        y.shape[0], rank, width, torch.get_num_threads(),
    )  # fmt: skip
    return y


def reduce(u: Tensor, y: Tensor) -> Tensor:
    """u.T @ y for u [tokens, rank] and y [tokens, width], both float32 or bfloat16 -> float32 [rank, width]."""
    (tokens, rank), width, lib, threads = u.shape, y.shape[1], extension(), torch.get_num_threads()
    if y.shape[0] != tokens:
        raise _misfit(u, y)
    out = torch.empty(rank, width)
    if _is_half(y):
        partial = torch.empty(threads - 1, rank, width)
        # Rows a power of two apart map to the same cache sets and would evict each other.
        transposed = torch.empty(rank, tokens + 32, dtype=y.dtype)
        transposed[:, :tokens].copy_(u.t())
        lib.reduce_bf16(
            transposed.data_ptr(), transposed.stride(0), y.data_ptr(), y.stride(0), out.data_ptr(), partial.data_ptr(),
            tokens, rank, width, threads,
        )  # fmt: skip
    else:
        lib.reduce(u.data_ptr(), u.stride(0), y.data_ptr(), y.stride(0), out.data_ptr(), tokens, rank, width, threads)
    return out


def dropout_(x: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """Dropout of x [tokens, width] in place, as philox.py defines it; float32, bfloat16 or float64, contiguous."""
    return _dropout(x, x, p, seed)


def dropout(x: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """:func:`dropout_` of a copy."""
    x = x.contiguous()
    return _dropout(x, torch.empty_like(x), p, seed)


def _dropout(x: Tensor, out: Tensor, p: float, seed: int | Tensor) -> Tensor:
    extension().dropout(
        x.data_ptr(), out.data_ptr(), DTYPE_CODES[x.dtype], *x.shape, p, int(seed), torch.get_num_threads()
    )
    return out
