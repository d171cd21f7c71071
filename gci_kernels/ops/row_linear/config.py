"""The launch configuration of row_linear's Triton kernel: a pure function of shape, dtype and chip."""

import torch

from gci_kernels.ops.launching import ProductConfig, choose_product_config


def choose_row_linear_config(
    tokens: int, depth: int, width: int, dtype: torch.dtype, capability: str, sum_rows: bool
) -> ProductConfig:
    """For [tokens, depth] @ [depth, width]; `sum_rows`: the rows with two sources run along the sum.

    That takes registers, of which there are enough: the choice does not depend on it, but tuning may find otherwise.
    """
    return choose_product_config(tokens, depth, width, dtype, capability)
