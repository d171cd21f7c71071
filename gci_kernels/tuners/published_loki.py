"""The published LoKI layer, which keeps trained and frozen rows in two linear layers, with a fused forward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gci_kernels.class_swap import Swapped, add_mixin
from gci_kernels.ops.row_linear import MergedRows, identity, partitioned_loki_linear
from gci_kernels.ops.transforms import transformed
from gci_kernels.tuners import fusion, sharding

_STATE = "_gci_published"
# What the published versions call the frozen part.
_FROZEN_NAMES = ("frozen", "fixed")


class _State:
    """What a layer with the fused forward keeps beside its own attributes; copies and pickles of it are empty.

    Attributes:
        merged: the merged weight.
    """

    def __init__(self) -> None:
        self.merged = MergedRows()
        self._order: tuple[tuple, Tensor] | None = None  # identity of an index_map, and its argsort

    def rows(self, index_map: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The rows that are trained [k] and those that are frozen [out - k], int64, in the order of their weights."""
        if torch.compiler.is_compiling():
            order = index_map.argsort()
        else:
            if self._order is None or self._order[0] != identity(index_map):
                self._order = identity(index_map), index_map.argsort()
            order = self._order[1]
        return order[:k], order[k:]

    def __deepcopy__(self, memo: dict) -> "_State":
        return _State()

    def __reduce__(self) -> tuple:
        return _State, ()


class FusedPublishedLayer(Swapped):
    """Mixin for the published layer: its forward becomes one product with the rows put together.

    Where one of the parts is no plain linear layer any more, or the frozen one is trained, the layer's own forward
    runs; `gci_kernels.report` says so.
    """

    gci_impl = "auto"  # gci_kernels.patch sets another on the instance
    own = ("gci_impl", _STATE)
    active: nn.Linear
    active_bias: Tensor | None
    index_map: Tensor

    def forward(self, own_forward: Callable[..., Tensor], x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]; ValueError where `gci_impl` cannot run."""
        if published_obstacle(self) is not None or self.gci_impl == "reference" or transformed():
            return own_forward(self, x)
        self._check_impl()
        state: _State = vars(self)[_STATE]
        frozen, frozen_bias = _frozen(self)
        positions, rest = state.rows(self.index_map, self.active.weight.shape[0])
        bias = active_bias = None
        if frozen_bias is not None:
            bias = frozen_bias.new_zeros(self.index_map.shape[0]).index_copy_(0, rest, frozen_bias.detach())
            active_bias = self.active_bias
        merged: MergedRows | None = state.merged
        if sharding.is_gathered(frozen):
            state.merged.drop()  # of the time before it was divided
            merged = None
        return partitioned_loki_linear(
            x, frozen.weight, bias, self.active.weight, positions, rest, active_bias, merged=merged
        )

    def _check_impl(self) -> None:
        if self.gci_impl not in ("auto", "aten", "reference"):
            raise ValueError(
                f"impl={self.gci_impl!r} cannot run here: the products of a published LoKI layer are the library's"
            )

    def plan(self, tokens: int, dtype: torch.dtype, device_type: str) -> str:
        """What the layer runs, for reports; ValueError where its `gci_impl` cannot."""
        self._check_impl()
        return "rows=reference" if self.gci_impl == "reference" else "rows=kept"

    def decode_plan(self, dtype: torch.dtype, device_type: str) -> None:
        """None: a decoding step has no kernel of its own."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FusedPublishedLayer":
        vars(self)[_STATE].merged.drop()
        return super()._apply(fn, recurse)


def is_published_layer(module: nn.Module) -> bool:
    """Whether `module` is the published LoKI repository's layer, of any of its versions, swapped or not."""
    return (
        type(module).__name__ == "LoKILinear"
        and _frozen_name(module) is not None
        and isinstance(getattr(module, "active", None), nn.Module)
        and isinstance(getattr(module, "index_map", None), Tensor)
    )


def swap(module: nn.Module) -> None:
    """Gives a published layer the fused forward, in place."""
    if not isinstance(module, FusedPublishedLayer):
        setattr(module, _STATE, _State())
        add_mixin(module, FusedPublishedLayer)


def published_obstacle(module: Any) -> str | None:
    """Why a published layer's own forward has to run, or None where the fused one may."""
    frozen, frozen_bias = _frozen(module)
    for name, part in (("active", module.active), (_frozen_name(module), frozen)):
        reason = fusion.obstacle(part)
        if reason is None and part.bias is not None:
            reason = "it has a bias of its own"
        if reason is not None:
            return f"{name}: {reason}"
    if frozen.weight.requires_grad or (frozen_bias is not None and frozen_bias.requires_grad):
        return "its frozen rows are trained"
    return None


def _frozen_name(module: nn.Module) -> str | None:
    return next((name for name in _FROZEN_NAMES if isinstance(getattr(module, name, None), nn.Module)), None)


def _frozen(module: nn.Module) -> tuple[Any, Tensor | None]:
    """The layer that has the frozen rows [out - k, in], and their bias [out - k]."""
    name = str(_frozen_name(module))
    return getattr(module, name), getattr(module, f"{name}_bias")


def describe(module: Any) -> tuple[str, str, torch.dtype | None]:
    """Method, shape and the weights' dtype, for reports."""
    k, width = module.active.weight.shape
    out = module.index_map.shape[0]
    return f"LoKI (published layer) {k} of {out} rows", f"{width} -> {out}", module.active.weight.dtype
