"""The methods that are compared, with their settings and learning rates."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn

import gci_kernels
from gci_kernels import loki

from ..baselines import to_eager
from ..variants import MLP

RANK = 32  # LoRAMoE's eight experts of rank 4 together


@dataclass(frozen=True)
class Method:
    """A method, and its row in the table.

    Attributes:
        title: the row's name.
        learning_rate: AdamW's, found by the rule of :mod:`.rates`.
        config: makes the adapter's config, given the file of LoKI's scores; None: all weights are trained, in float32.
        rega: whether to train on REGA's mixture instead of the domain's tasks alone.
        eager: whether the layers compute in eager PyTorch, as the published LoRAMoE does.
    """

    title: str
    learning_rate: float
    config: Callable[[Path], object] | None
    rega: bool = False
    eager: bool = False


def _lora(_: Path) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=MLP)


def _loramoe(balance: float) -> Callable[[Path], gci_kernels.LoRAMoEConfig]:
    return lambda _: gci_kernels.LoRAMoEConfig(r=4, num_experts=8, lora_alpha=32, balance_weight=balance)


def _loki(quota: float, rank: int | None = None) -> Callable[[Path], gci_kernels.LoKIConfig]:
    def config(scores: Path) -> gci_kernels.LoKIConfig:
        positions = loki.select(loki.load_scores(scores), quota)
        return gci_kernels.LoKIConfig(positions=positions, r=rank, lora_alpha=2 * (rank or 1))

    return config


def _alora(_: Path) -> gci_kernels.ALoRAConfig:
    return gci_kernels.ALoRAConfig(r=RANK, num_heads=4, lora_alpha=2 * RANK, target_modules=MLP)


METHODS = {
    "full": Method("full fine-tuning", 2e-5, None),
    "lora": Method("LoRA r=32", 2e-4, _lora),
    "lora_rega": Method("LoRA r=32 + REGA", 2e-4, _lora, rega=True),
    "alora": Method("ALoRA r=32", 1e-4, _alora),
    "loramoe": Method("LoRAMoE 8x4", 2e-4, _loramoe(0.0)),
    "loramoe_balance": Method("LoRAMoE 8x4, balanced", 2e-4, _loramoe(0.1)),
    "loki_10": Method("LoKI 10%", 5e-4, _loki(10)),
    "loki_30": Method("LoKI 30%", 2e-4, _loki(30)),
    "loki_star": Method("LoKI* 30%, r=32", 1e-3, _loki(30, RANK)),
}
EAGER = {"loramoe_eager": Method("LoRAMoE 8x4, eager PyTorch", 2e-4, _loramoe(0.0), eager=True)}


def adapt(model: nn.Module, method: Method, scores: Path, seed: int) -> nn.Module:
    """Adapts `model` in place by `method`; `seed` is that of the adapters' initial weights."""
    if method.config is None:
        return model.float().requires_grad_(True)
    model.requires_grad_(False)
    torch.manual_seed(seed)
    adapted = gci_kernels.patch(model, method.config(scores))
    return to_eager(adapted) if method.eager else adapted
