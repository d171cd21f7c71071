"""The mixers of the package's own methods, each registered by its module."""

from gci_kernels.ops.bottleneck.mixers.attention import ATTENTION
from gci_kernels.ops.bottleneck.mixers.gate import GATE
from gci_kernels.ops.bottleneck.mixers.identity import IDENTITY

__all__ = ["ATTENTION", "GATE", "IDENTITY"]
