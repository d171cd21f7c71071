"""The linear layer with trained rows as its formula, in plain PyTorch: what tests compare with, in any dtype."""

import torch.nn.functional as F
from torch import Tensor


def loki_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, active_weight: Tensor, positions: Tensor, active_bias: Tensor | None
) -> Tensor:
    """y = x @ W'.T + b', W' and b' being W and b with the rows at `positions` replaced (LoKI, arXiv 2505.22120).

    Args:
        x: [..., in], any floating dtype and device.
        weight: [out, in] in x's dtype.
        bias: [out] in x's dtype, or None.
        active_weight: [k, in], any floating dtype; used in x's.
        positions: [k] int64, the rows to replace.
        active_bias: [k], any floating dtype, used in x's; or None. It needs a bias.

    Returns:
        [..., out], x's dtype.
    """
    merged = weight.index_copy(0, positions, active_weight.to(x.dtype))
    return F.linear(x, merged, merged_bias(bias, active_bias, positions))


def merged_bias(bias: Tensor | None, active_bias: Tensor | None, positions: Tensor) -> Tensor | None:
    """b' [out] in b's dtype: `bias` [out] with `active_bias` [k] at `positions` [k]; `bias` where either is None."""
    return bias if bias is None or active_bias is None else bias.index_copy(0, positions, active_bias.to(bias.dtype))
