"""Adapters as PEFT methods. Importing this registers GCI_LORAMOE, GCI_ALORA, GCI_LOKI: from_pretrained finds them."""

from gci_kernels.tuners.alora import ALoRAConfig, ALoRALinear, ALoRAModel
from gci_kernels.tuners.base import AdaptedLinear
from gci_kernels.tuners.bottleneck import BottleneckConfig
from gci_kernels.tuners.loki import LoKIConfig, LoKILinear, LoKIModel
from gci_kernels.tuners.lora import FusedLoraLinear
from gci_kernels.tuners.loramoe import LoRAMoEConfig, LoRAMoELinear, LoRAMoEModel
from gci_kernels.tuners.methods import METHODS, Method
from gci_kernels.tuners.registration import register, unregister

__all__ = [
    "ALoRAConfig", "ALoRALinear", "ALoRAModel", "AdaptedLinear", "BottleneckConfig", "FusedLoraLinear", "LoKIConfig",
    "LoKILinear", "LoKIModel", "LoRAMoEConfig", "LoRAMoELinear", "LoRAMoEModel", "METHODS", "Method", "register",
    "unregister",
]  # fmt: skip
