"""The published LoKI layer, which keeps trained and frozen rows in two linear layers, with a fused forward."""

import torch
from torch import Tensor, nn

from gci_kernels.class_swap import Swapped, give_class, subclass
from gci_kernels.ops.row_linear import MergedRows, identity, partitioned_loki_linear
from gci_kernels.ops.transforms import transformed
from gci_kernels.tuners import fusion

_STATE = "_gci_split"
# What the published versions call the frozen part.
_FROZEN = ("frozen", "fixed")


class _State:
    """What a swapped layer has beside its own: the merged weight, and its rows' indices."""

    def __init__(self) -> None:
        self.merged = MergedRows()
        self.made_of: tuple | None = None  # identity of the layer's index_map
        self.rows: Tensor | None = None

    def split(self, index_map: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The rows that are trained [k] and those that are not, in the order of their weights."""
        if torch.compiler.is_compiling():
            rows = index_map.argsort()
            return rows[:k], rows[k:]
        if self.made_of != identity(index_map):
            self.made_of, self.rows = identity(index_map), index_map.argsort()
        return self.rows[:k], self.rows[k:]

    def __deepcopy__(self, memo: dict) -> "_State":
        return _State()

    def __reduce__(self) -> tuple:
        return _State, ()


class FusedSplit(Swapped):
    """Mixin for the published layer: its forward becomes one product with the rows put together.

    Where one of the parts is no plain linear layer any more, or the frozen one is trained, the layer's own forward
    runs; `gci_kernels.report` says so.
    """

    gci_impl = "auto"  # gci_kernels.patch sets another on the instance

    def forward(self, own_forward, x: Tensor) -> Tensor:
        if split_obstacle(self) is not None or self.gci_impl == "reference" or transformed():
            return own_forward(self, x)
        plan(self)
        state: _State = vars(self)[_STATE]
        frozen, active = _frozen(self), self.active.weight
        positions, rest = state.split(self.index_map, active.shape[0])
        bias = frozen_bias = getattr(self, f"{_frozen_name(self)}_bias")
        if frozen_bias is not None:
            bias = frozen_bias.new_zeros(self.index_map.shape[0]).index_copy_(0, rest, frozen_bias.detach())
        return partitioned_loki_linear(
            x, frozen.weight, bias, active, positions, rest, self.active_bias if bias is not None else None,
            merged=state.merged,
        )  # fmt: skip

    def _apply(self, fn, recurse=True):
        vars(self)[_STATE].merged.drop()
        return super()._apply(fn, recurse)


def is_split(module: nn.Module) -> bool:
    """Whether `module` is the published LoKI repository's layer, of any of its versions, swapped or not."""
    return (
        type(module).__name__ == "LoKILinear"
        and _frozen_name(module) is not None
        and isinstance(getattr(module, "active", None), nn.Module)
        and isinstance(getattr(module, "index_map", None), Tensor)
    )


def swap(module: nn.Module) -> None:
    """Gives a published layer the fused forward, in place."""
    if not isinstance(module, FusedSplit):
        setattr(module, _STATE, _State())
        give_class(module, subclass(type(module), FusedSplit))


def swap_back(module: nn.Module) -> None:
    """Undoes :func:`swap`."""
    vars(module).pop("gci_impl", None)
    give_class(module, module._gci_parts[0])
    delattr(module, _STATE)


def split_obstacle(module: nn.Module) -> str | None:
    """Why the layer's own forward runs, or None."""
    for name in ("active", _frozen_name(module)):
        part = getattr(module, name)
        reason = fusion.obstacle(part)
        if reason is None and part.bias is not None:
            reason = "it has a bias of its own"
        if reason is not None:
            return f"{name}: {reason}"
    frozen_bias = getattr(module, f"{_frozen_name(module)}_bias")
    if _frozen(module).weight.requires_grad or (frozen_bias is not None and frozen_bias.requires_grad):
        return "its frozen rows are trained"
    return None


def plan(module: nn.Module) -> str:
    """What runs, for reports; ValueError where the implementation asked for cannot."""
    impl = module.gci_impl
    if impl not in ("auto", "aten", "reference"):
        raise ValueError(f"impl={impl!r} cannot run here: the products of a published LoKI layer are the library's")
    return "rows=reference" if impl == "reference" else "rows=kept"


def _frozen_name(module: nn.Module) -> str | None:
    return next((name for name in _FROZEN if isinstance(getattr(module, name, None), nn.Module)), None)


def _frozen(module: nn.Module) -> nn.Linear:
    return getattr(module, _frozen_name(module))


def describe(module: nn.Module) -> tuple[str, str, torch.dtype]:
    """Method and shape, for reports, and the weights' dtype."""
    k, width = module.active.weight.shape
    out = module.index_map.shape[0]
    return f"LoKI (published layer) {k} of {out} rows", f"{width} -> {out}", module.active.weight.dtype
