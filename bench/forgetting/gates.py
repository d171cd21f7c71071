"""Which experts LoRAMoE's routers choose for which kind of task."""

import torch
from torch import Tensor, nn

from gci_kernels.tuners import LoRAMoELinear

from ..baselines import ADAPTER
from .batches import Batch


@torch.inference_mode()
def mean_gates(model: nn.Module, batches: list[Batch]) -> list[list[float]]:
    """[2, experts]: the mean gate of each expert over all tokens (no padding) and layers, by task type 0 and 1."""
    layers = [module for module in model.modules() if isinstance(module, LoRAMoELinear)]
    experts = layers[0].configs[ADAPTER].num_experts
    sums, counts = torch.zeros(2, experts, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    batch: Batch

    def add(layer: LoRAMoELinear, args: tuple[Tensor, ...]) -> None:
        router = layer.loramoe_router[ADAPTER]
        gates = (args[0].to(router.dtype) @ router.T).softmax(-1, dtype=torch.float32)
        for kind in (0, 1):
            chosen = gates[(batch.task_types == kind)[:, None] & batch.attention_mask.bool()]
            sums[kind] += chosen.sum(0)
            counts[kind] += len(chosen)

    handles = [layer.register_forward_pre_hook(add) for layer in layers]
    try:
        for batch in batches:
            batch.logits(model)
    finally:
        for handle in handles:
            handle.remove()
    return (sums / counts[:, None]).tolist()


def separation(gates: list[list[float]]) -> float:
    """How far the first half of the experts serves one kind of task more than the other: 0 where all serve alike.

    The share of the gates that the first half of the experts gets, by task type; the distance between the two shares.
    """
    shares = [sum(means[: len(means) // 2]) / sum(means) for means in gates]
    return abs(shares[1] - shares[0])
