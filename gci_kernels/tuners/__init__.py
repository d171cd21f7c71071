"""Adapters as PEFT methods. Importing this registers GCI_LORAMOE with PEFT, so that from_pretrained finds it."""

from gci_kernels.tuners.lora import FusedLoraLinear
from gci_kernels.tuners.loramoe import LoRAMoEConfig, LoRAMoELayer, LoRAMoELinear, LoRAMoEModel

__all__ = ["FusedLoraLinear", "LoRAMoEConfig", "LoRAMoELayer", "LoRAMoELinear", "LoRAMoEModel"]
