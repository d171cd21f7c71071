"""Adapters as PEFT methods. Importing this registers GCI_LORAMOE and GCI_ALORA: from_pretrained finds them."""

from gci_kernels.tuners.alora import ALoRAConfig, ALoRALinear, ALoRAModel
from gci_kernels.tuners.base import BottleneckConfig, BottleneckLayer
from gci_kernels.tuners.lora import FusedLoraLinear
from gci_kernels.tuners.loramoe import LoRAMoEConfig, LoRAMoELinear, LoRAMoEModel

__all__ = [
    "ALoRAConfig",
    "ALoRALinear",
    "ALoRAModel",
    "BottleneckConfig",
    "BottleneckLayer",
    "FusedLoraLinear",
    "LoRAMoEConfig",
    "LoRAMoELinear",
    "LoRAMoEModel",
]
