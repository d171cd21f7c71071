"""An adapter's scaling: a number, or a tensor whose value may be filled in at any time.

PEFT's prepare_model_for_compiled_hotswap makes tensors of them, which hotswap_adapter then fills in place, so that a
compiled graph need not be made again.
"""

from numbers import Real
from typing import Any

import torch
from torch import Tensor


def number(scaling: Any) -> Any:
    """The scaling's present value, a number; None where it cannot be read now.

    Reading it from a GPU would wait, a graph of torch.compile would keep it as a constant, a gradient would be lost.
    """
    if type(scaling) is float or isinstance(scaling, (float, int)):
        return scaling
    if not isinstance(scaling, Tensor):
        if not isinstance(scaling, Real):
            raise TypeError(f"scaling must be a number or a tensor, got {type(scaling).__name__}")
        return float(scaling)
    if torch.compiler.is_compiling() or scaling.device.type != "cpu" or scaling.numel() != 1 or scaling.requires_grad:
        return None
    return scaling.item()


def applied(scaling: Any, B: Tensor) -> tuple[float, Tensor]:
    """The scaling as an op takes it, and B [out, columns], into which the value goes where it cannot be read."""
    value = number(scaling)
    if value is not None:
        return value, B
    if scaling.numel() == 1:
        return 1.0, B * scaling.reshape(())
    if scaling.shape[-1:] == B.shape[:1] and scaling.numel() == B.shape[0]:  # one for each output
        return 1.0, B * scaling.reshape(-1, 1)
    raise ValueError(
        f"scaling must be one number, or one for each of the {B.shape[0]} outputs, got {list(scaling.shape)}"
    )
