"""The linear layer with trained rows as its formula, in plain PyTorch: the oracle of every test, in any dtype."""

import torch.nn.functional as F
from torch import Tensor


def loki_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, active_weight: Tensor, positions: Tensor, active_bias: Tensor | None
) -> Tensor:
    """y = x @ W'.T + b', W' and b' being W and b with the rows at `positions` replaced (LoKI, arXiv 2505.22120)."""
    merged = weight.index_copy(0, positions, active_weight.to(x.dtype))
    if active_bias is not None:
        bias = bias.index_copy(0, positions, active_bias.to(x.dtype))
    return F.linear(x, merged, bias)
