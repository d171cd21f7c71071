"""Operations on tensors; nothing here knows PEFT or transformers."""

from gci_kernels.ops.bottleneck import balance_loss, lora_linear, loramoe_linear

__all__ = ["balance_loss", "lora_linear", "loramoe_linear"]
