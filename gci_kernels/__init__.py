"""Fused kernels for adapters that keep a language model's general abilities."""

from gci_kernels import ops

__version__ = "0.1.0"
__all__ = ["ops"]
