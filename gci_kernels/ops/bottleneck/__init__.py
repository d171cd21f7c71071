"""y = base(x) + scaling * mix(x @ A.T) @ B.T, for every adapter of that form."""

from gci_kernels.ops.bottleneck import kernels as kernels
from gci_kernels.ops.bottleneck.api import adapted_linear, alora_linear, bottleneck_linear, lora_linear, loramoe_linear
from gci_kernels.ops.bottleneck.balance import balance_loss
from gci_kernels.ops.bottleneck.mixer import Call, Mixer, Output
from gci_kernels.ops.bottleneck.plan import choose_plan
from gci_kernels.ops.bottleneck.registry import register
from gci_kernels.ops.bottleneck.shared_input import adapted_linears

__all__ = [
    "Call", "Mixer", "Output", "adapted_linear", "adapted_linears", "alora_linear", "balance_loss", "bottleneck_linear",
    "choose_plan", "lora_linear", "loramoe_linear", "register",
]  # fmt: skip
