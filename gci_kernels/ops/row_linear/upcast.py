"""The linear layer with trained rows for bfloat16 and float16 on CPUs without a fast product of them (ops/upcast.py).

W' is never made: the active rows are written into each block of W that is converted to float32.
"""

from torch import Tensor

from gci_kernels.ops.upcast import large_product


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, positions: Tensor, form: str) -> Tensor:
    """x @ W'.T + bias, [tokens, out] in x's dtype.

    Args:
        x: [tokens, in], bfloat16 or float16, on a CPU.
        weight: [out, in] in x's dtype.
        bias: [out] in x's dtype, or None.
        active: [k, in], any floating dtype; used in x's.
        positions: [k] int64, the rows of W' that `active` holds.
        form: "upcast".
    """
    active = active.to(x.dtype)

    def block(columns: slice) -> Tensor:
        rows = weight[columns].float()
        inside = ((positions >= columns.start) & (positions < columns.stop)).nonzero().squeeze(1)
        rows.index_copy_(0, positions[inside] - columns.start, active[inside].float())
        return rows.t()

    return large_product(x, x.new_empty(x.shape[0], weight.shape[0]), block, bias)


def dx(dy: Tensor, weight: Tensor, active: Tensor, positions: Tensor, dy_active: Tensor, form: str) -> Tensor:
    """dy @ W', [tokens, in] in dy's dtype.

    Args:
        dy: [tokens, out], the output's gradient.
        weight, active, positions, form: what :func:`forward` was given.
        dy_active: [tokens, k], dy's columns at `positions`; not used.
    """
    active = active.to(dy.dtype)

    def block(columns: slice) -> Tensor:
        return weight[:, columns].float().index_copy_(0, positions, active[:, columns].float())

    return large_product(dy, dy.new_empty(dy.shape[0], weight.shape[1]), block)
