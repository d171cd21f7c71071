"""Operations on tensors; nothing here knows PEFT or transformers."""

from gci_kernels.ops import decode, gate  # noqa: F401  # their GPU kernels are registered
from gci_kernels.ops.attention import Sequence, low_rank_attention
from gci_kernels.ops.bottleneck import alora_linear, balance_loss, lora_linear, loramoe_linear
from gci_kernels.ops.row_linear import MergedRows, loki_linear

__all__ = [
    "MergedRows", "Sequence", "alora_linear", "balance_loss", "loki_linear", "lora_linear", "loramoe_linear",
    "low_rank_attention",
]  # fmt: skip
