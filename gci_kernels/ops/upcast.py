"""Products of 16-bit tensors through float32, for CPUs on which the library has no fast 16-bit product.

There PyTorch multiplies bfloat16 and float16 one element at a time in forward, dX or both, 10 to 70 times slower than
float32. Here blocks of both operands are converted to float32 and multiplied by the library's float32 product; each sum
is rounded once, at its end. Temporary memory is three blocks of at most 16 MiB, whatever the sizes of the operands.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gci_kernels.impl import HALVES

_BLOCK = 1 << 22  # float32 numbers in a block
_ROWS = 1024  # of x in a block at most; with so many, converting the weight for each block costs little
#: Whether PyTorch says that it has a fast product of this dtype on this CPU. Constants, so that torch.compile can trace
#: the functions that choose a plan.
LIBRARY_MULTIPLIES = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
# Tokens from which two conversions and a float32 product take less time than the library's 16-bit product and dX;
# measured with 2 threads at 576x1536. Without AVX-512 the library computes dX one element at a time. With AVX-512 and
# without AVX512_BF16 oneDNN converts to float32 too, and reaches 0.4 of float32's speed.
_FROM, _FROM_AVX512 = 4, 16


def upcast_from(dtype: torch.dtype, isa: str, library: bool | None = None) -> int | None:
    """The number of tokens from which "auto" takes these products on a CPU; None: never.

    Args:
        isa: the CPU's instruction set, one of native.ISAS.
        library: whether PyTorch has a fast product of `dtype`; None: as on this CPU.
    """
    if dtype not in HALVES:
        return None
    if not (LIBRARY_MULTIPLIES[dtype] if library is None else library):
        return _FROM
    return _FROM_AVX512 if dtype == torch.bfloat16 and isa == "avx512" else None


def product(x: Tensor, m: Tensor) -> Tensor:
    """x @ m in float32 for x [tokens, depth] and a small m [depth, width] of any floating dtype."""
    out, m = torch.empty(x.shape[0], m.shape[1]), m.float()
    for rows in _blocks(x.shape[0], _BLOCK // max(x.shape[1], 1)):
        torch.mm(x[rows].float(), m, out=out[rows])
    return out


def reduced(u: Tensor, y: Tensor) -> Tensor:
    """u.T @ y in float32 for a narrow u [tokens, r] and y [tokens, width]."""
    out = torch.zeros(u.shape[1], y.shape[1])
    for rows in _blocks(u.shape[0], _BLOCK // max(y.shape[1], 1)):
        out.addmm_(u[rows].float().t(), y[rows].float())
    return out


def large_product(
    x: Tensor, y: Tensor, block: Callable[[slice], Tensor], bias: Tensor | None = None,
    finish: Callable[[Tensor, slice, slice], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """y = finish(x @ w + bias), computed block by block and written into y [tokens, width], which is returned.

    Args:
        x: [tokens, depth], bfloat16 or float16, on a CPU.
        block: takes a slice of columns; returns these columns of w [depth, width] in float32.
        bias: [width], any floating dtype, or None.
        finish: takes a block of the sums in float32, its rows and its columns; returns what is rounded and stored;
            None: the sums are.
    """
    (tokens, depth), width = x.shape, y.shape[1]
    height = min(_ROWS, max(_BLOCK // max(depth, 1), 1))
    for rows in _blocks(tokens, height):
        wide = x[rows].float()
        for columns in _blocks(width, _BLOCK // max(depth, min(height, tokens), 1)):
            sums = torch.mm(wide, block(columns))
            if bias is not None:
                sums += bias[columns]
            y[rows, columns] = sums if finish is None else finish(sums, rows, columns)
    return y


def _blocks(count: int, size: int) -> list[slice]:
    size = max(size, 1)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
