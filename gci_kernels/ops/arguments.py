"""What the ops on linear layers do with their arguments first: autocast, checks, flattening to rows."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Out = TypeVar("_Out")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast converts a linear layer's operands; None if it does not: it is off, or x is float64.

    Raises:
        TypeError: x is no tensor.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    device_type = x.device.type  # looked up once: it takes as long as the rest of this function
    if device_type == "meta":  # torch has no autocast there, and raises when asked
        return None
    if not torch.is_autocast_enabled(device_type) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device_type)


def autocast(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, weight and bias of a linear layer, converted as autocast converts them; unchanged where it is off."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, weight, bias
    return x.to(dtype), None if weight is None else weight.to(dtype), None if bias is None else bias.to(dtype)


def without_autocast(op: Callable[..., _Out]) -> Callable[..., _Out]:
    """`op`, whose first argument is a tensor, with autocast off: its arguments have the dtypes it is to compute in."""

    @functools.wraps(op)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> _Out:
        if autocast_dtype(x) is None:
            return op(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return op(x, *args, **kwargs)

    return run


#: torch.index_copy, which under autocast refuses tensors of the 16-bit type that is not autocast's.
index_copy = without_autocast(torch.index_copy)


def check_x(x: Tensor) -> None:
    """Raise TypeError or ValueError unless x is a floating point [..., in] with in >= 1."""
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be [..., in] with in >= 1, got {list(x.shape)}")


def check_tensor(name: str, value: Tensor, shape: tuple[int | None, ...], x: Tensor, same_dtype: bool) -> None:
    """Raise TypeError or ValueError unless `value` is a floating point tensor of `shape` on x's device.

    Args:
        name: the argument's name, for the message.
        shape: None stands for any size.
        same_dtype: whether it must have x's dtype.
    """
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


#: Makes a NamedTuple of all its fields, without a call of Python's.
new_record: Any = tuple.__new__


def rows(x: Tensor) -> Tensor:
    """x [..., features] as [tokens, features] with contiguous rows; a copy only where no view is possible."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def from_rows(y: Tensor, x: Tensor) -> Tensor:
    """y [tokens, out] as [..., out], for x [..., in]; nothing else may hold y.

    For autograd the result is not a view. Models write in place into a linear layer's output (OLMo's clamp_), which is
    forbidden for a view that a Function returns, and FSDP's hooks get lost on views.
    """
    return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])
