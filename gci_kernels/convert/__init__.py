"""Checkpoints of the published LoRAMoE and LoKI repositories, to ours and back."""

from gci_kernels.convert.conversions import convert, recognise
from gci_kernels.convert.files import ConvertError
from gci_kernels.convert.formats import Conversion, Converted, Format
from gci_kernels.convert.loki import loki_from_published, loki_merge_published, loki_to_published
from gci_kernels.convert.loramoe import loramoe_from_published, loramoe_to_published

__all__ = [
    "Conversion", "ConvertError", "Converted", "Format", "convert", "loki_from_published", "loki_merge_published",
    "loki_to_published", "loramoe_from_published", "loramoe_to_published", "recognise",
]  # fmt: skip
