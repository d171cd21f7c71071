"""The bottleneck adapters as their formulas, in plain PyTorch: the oracle of every test, in any floating dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gci_kernels.ops.attention import reference as attention
from gci_kernels.ops.bottleneck import philox
from gci_kernels.ops.gate.reference import gate
from gci_kernels.ops.transforms import transformed


def _base(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | float:
    return 0.0 if weight is None else F.linear(x, weight, bias)


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if not p:
        return x
    if seed is None:  # what records or transforms operations could not look into one of ours
        return F.dropout(x, p)
    keep = philox.keep_mask(x.numel() // x.shape[-1], x.shape[-1], p, int(seed), x.device)
    return x * keep.view(x.shape) / (1 - p)


def lora_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor,
    scaling: float, dropout_p: float, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """y = x @ W.T + b + scaling * dropout(x) @ A.T @ B.T (LoRA, arXiv 2106.09685)."""
    A, B = A.to(x.dtype), B.to(x.dtype)
    return _base(x, weight, bias) + scaling * F.linear(F.linear(_dropped(x, dropout_p, seed), A), B)


def loramoe_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, router: Tensor,
    scaling: float, top_k: int, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = x @ W.T + b + scaling * (gates * (dropout(x) @ A.T)) @ B.T; gates = softmax(x @ router.T) (arXiv 2312.09979)

    with the top_k largest gates kept, and each multiplying its expert's r values.
    """
    A, B, router = A.to(x.dtype), B.to(x.dtype), router.to(x.dtype)
    u, gates = gate(F.linear(_dropped(x, dropout_p, seed), A), F.linear(x, router), top_k)
    return _base(x, weight, bias) + scaling * F.linear(u, B), gates


def alora_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, qkv: Tensor, B: Tensor, num_heads: int,
    residual: bool, scaling: float, segments: Tensor | None, past: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = x @ W.T + b + scaling * (o [+ z]) @ B.T (ALoRA, arXiv 2405.17830)

    with z = dropout(x) @ A.T, [q | k | v] = z @ qkv.T and o the causal attention of q to past and present k and v. Also
    returns the present k and v, side by side; without a gradient, unless a transform differentiates all there is.
    """
    A, qkv, B = A.to(x.dtype), qkv.to(x.dtype), B.to(x.dtype)
    z = F.linear(_dropped(x, dropout_p, seed), A)
    made = F.linear(z if z.dim() == 3 else z.unsqueeze(0), qkv)
    q, new = made.tensor_split([A.shape[0]], dim=-1)
    k, v = (new if past is None else torch.cat((past, new), dim=1)).chunk(2, dim=-1)
    o = attention.forward(q, k, v, num_heads, segments)[0].view(z.shape)
    y = _base(x, weight, bias) + scaling * F.linear(o + z if residual else o, B)
    return y, new if transformed() else new.detach()
