"""Operations on tensors; nothing here knows PEFT or transformers."""

from gci_kernels.ops import decode, gate  # noqa: F401  # their GPU kernels are registered
from gci_kernels.ops.attention import Sequence, low_rank_attention
from gci_kernels.ops.bottleneck import (
    Call,
    Mixer,
    Output,
    alora_linear,
    balance_loss,
    bottleneck_linear,
    lora_linear,
    loramoe_linear,
)
from gci_kernels.ops.row_linear import MergedRows, loki_linear

__all__ = [
    "Call", "MergedRows", "Mixer", "Output", "Sequence", "alora_linear", "balance_loss", "bottleneck_linear",
    "loki_linear", "lora_linear", "loramoe_linear", "low_rank_attention",
]  # fmt: skip
