"""How LoRAMoE's routers share the two types of tasks among the experts."""

import contextlib

import torch
from torch import Tensor, nn

from gci_kernels.tuners import LoRAMoELinear

from ..baselines import ADAPTER
from .batches import Batch


@torch.inference_mode()
def mean_gates(model: nn.Module, batches: list[Batch]) -> list[list[float]] | None:
    """The mean gate of each expert over all tokens (without padding) and layers, [2, experts]: task types 0 and 1.

    None where the model has no layers of LoRAMoE.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRAMoELinear)]
    if not layers:
        return None
    experts = layers[0].configs[ADAPTER].num_experts
    sums, counts = torch.zeros(2, experts, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    batch: Batch

    def add(layer: LoRAMoELinear, args: tuple[Tensor, ...]) -> None:
        router = layer.loramoe_router[ADAPTER]
        gates = (args[0].to(router.dtype) @ router.T).softmax(-1, dtype=torch.float32)
        for task_type in (0, 1):
            chosen = gates[(batch.task_types == task_type)[:, None] & batch.attention_mask.bool()]
            sums[task_type] += chosen.sum(0)
            counts[task_type] += len(chosen)

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(add))
        for batch in batches:
            batch.logits(model)
    return (sums / counts[:, None]).tolist()


def separation(gates: list[list[float]]) -> float:
    """The difference, between the two task types, of the share of the gates that the first half of the experts gets.

    `gates` is what :func:`mean_gates` returns. 0 where all experts serve both types alike.
    """
    shares = [sum(means[: len(means) // 2]) / sum(means) for means in gates]
    return abs(shares[1] - shares[0])
