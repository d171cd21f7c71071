"""The stages for bfloat16 and float16 on CPUs without a fast product of them: float32 products (ops/upcast.py).

They are those of aten.py, but project and reduce return their float32 sums without rounding them.
"""

from torch import Tensor

from gci_kernels.ops.upcast import large_product, product, reduced

project, reduce = product, reduced


def expand(u: Tensor, m: Tensor, x: Tensor, w: Tensor | None, bias: Tensor | None) -> Tensor:
    """u @ m + x @ w + bias, rounded once; [tokens, width] in x's dtype.

    Args:
        u: [tokens, R], any floating dtype.
        m: [R, width], any floating dtype and strides.
        x: [tokens, depth], bfloat16 or float16.
        w: [depth, width] in x's dtype, any strides; None: u @ m alone.
        bias: [width] in x's dtype, or None.
    """
    y = x.new_empty(u.shape[0], m.shape[1])
    return y.copy_(product(u, m)) if w is None else _accumulate(y, u, m, x, w, bias, add=False)


def expand_onto(y: Tensor, u: Tensor, m: Tensor, x: Tensor, w: Tensor | None, bias: Tensor | None) -> Tensor:
    """:func:`expand` added to y [tokens, width] in place, which is returned."""
    return y.add_(product(u, m)) if w is None else _accumulate(y, u, m, x, w, bias, add=True)


def add_product(y: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """x [tokens, depth] @ w [depth, width] added to y [tokens, width] in place, which is returned."""
    return large_product(
        x, y, lambda columns: w[:, columns].float(), finish=lambda sums, rows, columns: sums.add_(y[rows, columns])
    )


def _accumulate(y: Tensor, u: Tensor, m: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, add: bool) -> Tensor:
    u, m = u.float(), m.float()

    def finish(sums: Tensor, rows: slice, columns: slice) -> Tensor:
        sums.addmm_(u[rows], m[:, columns])
        if bias is not None:
            sums += bias[columns]
        return sums.add_(y[rows, columns]) if add else sums

    return large_product(x, y, lambda columns: w[:, columns].float(), finish=finish)
