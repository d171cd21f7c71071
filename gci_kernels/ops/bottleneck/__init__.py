"""y = base(x) + scaling * mix(x @ A.T) @ B.T, for every adapter of that form."""

from gci_kernels.ops.bottleneck import kernels as kernels
from gci_kernels.ops.bottleneck.api import alora_linear, lora_linear, loramoe_linear
from gci_kernels.ops.bottleneck.balance import balance_loss
from gci_kernels.ops.bottleneck.plan import choose_plan

__all__ = ["alora_linear", "balance_loss", "choose_plan", "lora_linear", "loramoe_linear"]
