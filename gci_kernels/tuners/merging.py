"""Merging PEFT's LoRA into base weights so that unmerging gives them their own bits back."""

from typing import TYPE_CHECKING, Any

from peft.tuners import lora
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor, nn

if TYPE_CHECKING:  # what the mixin is mixed with
    _Layer = lora.Linear
else:
    _Layer = object

_KEPT, _ROUNDED = "_gci_unmerged", "_gci_rounded"


class ExactMerge(_Layer):
    """Mixin for a LoRA layer of PEFT, which unmerges by subtracting what it has added: that rounds.

    While an adapter is merged, the layer keeps a copy of its base layer's weights. Weights that are quantised are
    quantised anew by merging; those stay PEFT's, and :func:`rounds` tells of it.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        kept = vars(self).get(_KEPT)
        if kept is None:
            kept = {name: p.detach().clone() for name, p in _weights(self).items() if type(p) is nn.Parameter}
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if self.merged:
            vars(self)[_KEPT] = kept
            vars(self)[_ROUNDED] = rounds(self) or kept.keys() != _weights(self).keys()

    def unmerge(self) -> None:
        super().unmerge()
        if not self.merged:
            for name, old in vars(self).pop(_KEPT, {}).items():
                _weights(self)[name].data.copy_(old)

    def forget_unmerged(self) -> None:
        """Drops what the mixin keeps, for a layer that gets its own class back."""
        vars(self).pop(_KEPT, None)
        vars(self).pop(_ROUNDED, None)


def rounds(layer: nn.Module) -> bool:
    """Whether merging has changed the layer's base weights for good."""
    return bool(vars(layer).get(_ROUNDED))


def _weights(layer: Any) -> dict[str, Tensor]:
    """What merging may write to: the base layer's parameters, or the one that is adapted itself."""
    base = layer.get_base_layer()
    only = getattr(layer, "parameter_name", None)
    return {n: p for n, p in base._parameters.items() if p is not None and not p.is_meta and only in (None, n)}


def inside_attention(model: nn.Module) -> set[int]:
    """The ids of the LoRA layers within PEFT's MultiheadAttention, which merges them itself around every call."""
    layers = (module for module in model.modules() if isinstance(module, MultiheadAttention))
    return {id(layer.base_layer.out_proj) for layer in layers}
