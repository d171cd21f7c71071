"""The products of a linear layer with trained rows for bfloat16 and float16 on CPUs without a fast product of them.

W' is never made: the active rows, in x's dtype as in the other forms, are put into each block of W that is converted to
float32 (ops/upcast.py).
"""

from torch import Tensor

from gci_kernels.ops.upcast import large_product


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, positions: Tensor, form: str) -> Tensor:
    """x @ W'.T + bias."""
    active = active.to(x.dtype)

    def block(columns: slice) -> Tensor:
        rows = weight[columns].float()
        chosen = ((positions >= columns.start) & (positions < columns.stop)).nonzero().squeeze(1)
        rows.index_copy_(0, positions[chosen] - columns.start, active[chosen].float())
        return rows.t()

    def finish(sums: Tensor, _: slice, columns: slice) -> Tensor:
        return sums if bias is None else sums.add_(bias[columns])

    return large_product(x, x.new_empty(x.shape[0], weight.shape[0]), block, finish)


def dx(dy: Tensor, weight: Tensor, active: Tensor, positions: Tensor, chosen: Tensor, form: str) -> Tensor:
    """dy @ W'."""
    active = active.to(dy.dtype)

    def block(columns: slice) -> Tensor:
        return weight[:, columns].float().index_copy_(0, positions, active[:, columns].float())

    return large_product(dy, dy.new_empty(dy.shape[0], weight.shape[1]), block, lambda sums, *_: sums)
