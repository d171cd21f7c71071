"""A linear layer in which some rows of the weight are trained and all others are frozen (LoKI, arXiv 2505.22120)."""

from gci_kernels.ops.row_linear import kernels as kernels
from gci_kernels.ops.row_linear.api import adapted_row_linear, check_positions, loki_linear, partitioned_loki_linear
from gci_kernels.ops.row_linear.merged import MergedRows, identity
from gci_kernels.ops.row_linear.plan import FORMS, choose_form, padded

__all__ = [
    "FORMS", "MergedRows", "adapted_row_linear", "check_positions", "choose_form", "identity", "loki_linear",
    "padded", "partitioned_loki_linear",
]  # fmt: skip
