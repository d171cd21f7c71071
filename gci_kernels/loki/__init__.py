"""LoKI (arXiv 2505.22120): score a model's knowledge vectors, and select those to train."""

from gci_kernels.loki.attribution import attribute
from gci_kernels.loki.files import attribute_file
from gci_kernels.loki.scores import ScoresError, load_scores
from gci_kernels.loki.selection import read_positions, select, write_positions

__all__ = [
    "ScoresError", "attribute", "attribute_file", "load_scores", "read_positions", "select", "write_positions",
]  # fmt: skip
