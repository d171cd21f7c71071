"""Fused kernels for adapters that keep a language model's general abilities.

model = gci_kernels.patch(model, gci_kernels.LoRAMoEConfig(r=4, num_experts=8))   # a PeftModel
print(gci_kernels.report(model))
"""

# First of all: it keeps other packages' notices out of our commands, and they are given during import.
from gci_kernels import quiet  # noqa: F401

# isort: split
from gci_kernels import loki, ops, rega
from gci_kernels.ops import Mixer
from gci_kernels.patching.patch import LayerReport, Report, patch, report, unpatch
from gci_kernels.tuners import (
    METHODS,
    ALoRAConfig,
    BottleneckConfig,
    LoKIConfig,
    LoRAMoEConfig,
    Method,
    register,
    unregister,
)

__version__ = "0.1.0"
__all__ = [
    "ALoRAConfig", "BottleneckConfig", "LayerReport", "LoKIConfig", "LoRAMoEConfig", "METHODS", "Method", "Mixer",
    "Report", "loki", "ops", "patch", "register", "rega", "report", "unpatch", "unregister",
]  # fmt: skip
