"""Operations on tensors; nothing here knows PEFT or transformers."""

from gci_kernels.ops.attention import Sequence, low_rank_attention
from gci_kernels.ops.bottleneck import alora_linear, balance_loss, lora_linear, loramoe_linear

__all__ = ["Sequence", "alora_linear", "balance_loss", "lora_linear", "loramoe_linear", "low_rank_attention"]
