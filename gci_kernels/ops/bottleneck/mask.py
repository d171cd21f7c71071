"""The mask of dropout, which a call whose products are Triton's makes once, and whose backward reads it again.

A bit for each element of x. To make the mask again in every kernel takes more instructions than to read it.
"""

import torch
from torch import Tensor

from gci_kernels.impl import implementation
from gci_kernels.ops.bottleneck import philox
from gci_kernels.ops.bottleneck.plan import Plan
from gci_kernels.ops.operators import define, no_derivative


def draw(x: Tensor, p: float, plan: Plan) -> Tensor:
    """What every part of a call has its mask from: a new seed, or a new mask; see :class:`.philox.Dropout`.

    Args:
        x: [..., width], on any device.
        p: the probability with which an element is dropped.
        plan: the call's.
    """
    seed = philox.draw_seed(x.device)
    if not plan.project == plan.expand == plan.reduce == "triton":
        return seed
    width = x.shape[-1]
    return torch.ops.gci_kernels.dropout_bits(seed, x.numel() // width, width, p)


def _bits(seed: Tensor, tokens: int, width: int, p: float) -> Tensor:
    return implementation("bottleneck", "triton").dropout_bits(tokens, width, p, seed, seed.device)


def _bits_fake(seed: Tensor, tokens: int, width: int, p: float) -> Tensor:
    return seed.new_empty(tokens, (width + 31) // 32, dtype=torch.int32)


define("dropout_bits(Tensor seed, int tokens, int width, float p) -> Tensor", _bits, _bits_fake,
       no_derivative("dropout_bits"))  # fmt: skip
