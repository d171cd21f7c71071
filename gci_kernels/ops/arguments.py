"""What the ops on linear layers do with their arguments first: autocast, checks, rows."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

_Out = TypeVar("_Out")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of a linear layer's operands; None where it leaves them: it is off, or x is float64."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.device.type == "meta":  # torch knows of no autocast there, and raises when asked
        return None
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)


def autocast(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The operands of a linear layer as autocast casts them."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, weight, bias
    return x.to(dtype), None if weight is None else weight.to(dtype), None if bias is None else bias.to(dtype)


def without_autocast(op: Callable[..., _Out]) -> Callable[..., _Out]:
    """`op` with autocast off: its arguments are cast already, and what it makes of them is meant to stay so."""

    @functools.wraps(op)
    def exact(x: Tensor, *args, **kwargs) -> _Out:
        if autocast_dtype(x) is None:
            return op(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return op(x, *args, **kwargs)

    return exact


#: torch.index_copy, which under autocast refuses tensors of the 16-bit type that is not autocast's.
index_copy = without_autocast(torch.index_copy)


def check_x(x: Tensor) -> None:
    """x [..., in], floating point."""
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be [..., in] with in >= 1, got {list(x.shape)}")


def check_tensor(name: str, value: Tensor, shape: tuple[int | None, ...], x: Tensor, same_dtype: bool) -> None:
    """That `value` is a floating point tensor of `shape`, None standing for any size, beside x."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    fits = value.dim() == len(shape) and all(
        size in (None, have) for size, have in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be [{wanted}], got {list(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {value.device}")
    if same_dtype and value.dtype != x.dtype:
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {value.dtype}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {value.dtype}")


def rows(x: Tensor) -> Tensor:
    """x as [tokens, features] with contiguous rows; a copy only where the strides allow no such view."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def from_rows(y: Tensor, x: Tensor) -> Tensor:
    """y [tokens, out], of which nothing else knows, as [..., out] beside x [..., in].

    To autograd it is no view: of a Function's output that would forbid what models do to a linear layer's, to write
    into it (OLMo's clamp_), and FSDP loses its hook there.
    """
    return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])
