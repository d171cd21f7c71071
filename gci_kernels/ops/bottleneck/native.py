"""The stages in C++ (csrc/cpu/skinny.cpp, dropout.cpp): CPU tensors; the products for float32 alone.

Same functions as aten.py. Rows of x, y and u are contiguous (the caller sees to it); m is any two-dimensional view.
"""

import torch
from torch import Tensor

from gci_kernels.native import DTYPE_CODES, extension


def project(x: Tensor, m: Tensor) -> Tensor:
    (tokens, depth), width = x.shape, m.shape[1]
    lib, threads = extension(), torch.get_num_threads()
    out = torch.empty(tokens, width)
    panel = torch.empty(depth, -(-width // lib.skinny_padding) * lib.skinny_padding)
    lib.pack_panel(m.data_ptr(), m.stride(0), m.stride(1), panel.data_ptr(), depth, width)
    lib.project(
        x.data_ptr(), x.stride(0), panel.data_ptr(), out.data_ptr(), out.stride(0), tokens, depth, width, threads
    )
    return out


def expand_(y: Tensor, u: Tensor, m: Tensor) -> None:
    m = m.contiguous()
    rank, width = m.shape
    extension().expand(
        u.data_ptr(), u.stride(0), m.data_ptr(), m.stride(0), y.data_ptr(), y.stride(0),
        y.shape[0], rank, width, torch.get_num_threads(),
    )  # fmt: skip


def reduce(u: Tensor, y: Tensor) -> Tensor:
    (tokens, rank), width, threads = u.shape, y.shape[1], torch.get_num_threads()
    out = torch.empty(rank, width)
    partial = torch.empty(threads, rank, width)
    extension().reduce(
        u.data_ptr(), u.stride(0), y.data_ptr(), y.stride(0), out.data_ptr(), partial.data_ptr(),
        tokens, rank, width, threads,
    )  # fmt: skip
    return out


def _dropout(x: Tensor, out: Tensor, p: float, seed: int, accumulate: bool) -> None:
    # The kernel walks [rows, cols] with no gaps.
    x = x.contiguous()
    extension().dropout(
        x.data_ptr(), out.data_ptr(), DTYPE_CODES[x.dtype], *x.shape, p, seed, accumulate, torch.get_num_threads()
    )


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    _dropout(x, out, p, seed, accumulate=False)
    return out


def dropout_add_(out: Tensor, x: Tensor, p: float, seed: int) -> None:
    _dropout(x, out, p, seed, accumulate=True)
