"""LoRAMoE's localized balancing constraint."""

import math

import torch
from torch import Tensor


def balance_loss(
    gates: Tensor, task_types: Tensor, *, delta: float, attention_mask: Tensor | None = None, num_experts: int
) -> Tensor:
    """The localized balancing constraint of LoRAMoE (arXiv 2312.09979, section 3.2), before its weight.

    Q[b, n] is the gate mass that sample b gives to expert n; I[b, n] = 1 + delta for the first half of the experts
    where task_types[b] is 1 and for the second half where it is 0, else 1 - delta; Z = I * Q. The loss is
    var(Z, unbiased) / (mean(Z)^2 + 1e-10), over all b and n.

    Args:
        gates: [batch, time, num_experts], float32 or float64, any device.
        task_types: [batch], 0 or 1, integer or bool, gates' device.
        delta: in [0, 1].
        attention_mask: [batch, time], 1 for tokens that count and 0 for padding; None counts every token, as the
            published code does.
        num_experts: even, gates' last size.

    Returns:
        A scalar of gates' dtype.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    for name, value in (("gates", gates), ("task_types", task_types), ("attention_mask", attention_mask)):
        if not isinstance(value, Tensor) and (value is not None or name != "attention_mask"):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if gates.dim() != 3 or gates.shape[-1] != num_experts:
        raise ValueError(f"gates must be [batch, time, num_experts={num_experts}], got {list(gates.shape)}")
    if num_experts < 2 or num_experts % 2:
        raise ValueError(f"num_experts must be even for the balance loss (two groups of experts), got {num_experts}")
    if not (math.isfinite(delta) and 0 <= delta <= 1):
        raise ValueError(f"delta must be in [0, 1], got {delta}")
    if task_types.shape != gates.shape[:1]:
        raise ValueError(f"task_types must be [batch={gates.shape[0]}], got {list(task_types.shape)}")
    if task_types.is_floating_point():
        raise TypeError(f"task_types must be integer or bool (0 or 1), got {task_types.dtype}")
    if attention_mask is not None:
        if attention_mask.shape != gates.shape[:2]:
            expected, actual = list(gates.shape[:2]), list(attention_mask.shape)
            raise ValueError(f"attention_mask must be [batch, time] = {expected} like gates, got {actual}")
        gates = gates * attention_mask.to(gates.dtype).unsqueeze(-1)
    first_half = torch.arange(num_experts, device=gates.device) < num_experts // 2
    favoured = first_half == task_types.bool().unsqueeze(1)
    z = gates.sum(dim=1) * (1 - delta + 2 * delta * favoured.to(gates.dtype))
    return z.var() / (z.mean() ** 2 + 1e-10)
