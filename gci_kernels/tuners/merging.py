"""Merging PEFT's LoRA into base weights so that unmerging gives them their own bits back."""

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor, nn

if TYPE_CHECKING:  # what the mixin is mixed with
    _Layer = lora.Linear
else:
    _Layer = object

_KEPT, _ROUNDED, _WRITTEN = "_gci_unmerged", "_gci_rounded", "_gci_written"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ExactMerge(_Layer):
    """Mixin for a LoRA layer of PEFT, which unmerges by subtracting what it has added: that rounds.

    While an adapter is merged, the layer keeps a copy of its base layer's weights. A weight that somebody has
    changed meanwhile is unmerged by subtracting, which keeps the change. Weights that are quantised are quantised anew
    by merging; those stay PEFT's, and :func:`rounds` tells of it.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        kept = self._still_merged() if self.merged else None
        if kept is None:
            kept = {name: p.detach().clone() for name, p in _weights(self).items() if type(p) is nn.Parameter}
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if self.merged:
            weights = _weights(self)
            vars(self)[_KEPT] = kept
            vars(self)[_WRITTEN] = {name: _fingerprint(weights[name]) for name in kept}
            vars(self)[_ROUNDED] = rounds(self) or kept.keys() != weights.keys()

    def unmerge(self) -> None:
        kept = self._still_merged()
        super().unmerge()
        if not self.merged:
            vars(self).pop(_KEPT, None)
            for name, old in kept.items():
                _weights(self)[name].data.copy_(old)

    def _still_merged(self) -> dict[str, Tensor]:
        """What was kept of the weights that are as merging left them."""
        weights, written = _weights(self), vars(self).get(_WRITTEN, {})
        kept = vars(self).get(_KEPT, {})
        return {n: t for n, t in kept.items() if n in weights and _fingerprint(weights[n]) == written[n]}

    def forget_unmerged(self) -> None:
        """Drops what the mixin keeps, for a layer that gets its own class back."""
        vars(self).pop(_KEPT, None)
        vars(self).pop(_ROUNDED, None)
        vars(self).pop(_WRITTEN, None)


def _fingerprint(weight: Tensor) -> tuple:
    """Tells a changed weight from an unchanged one: shape, dtype, and a sum over all bits and their places."""
    bits = weight.detach().contiguous().view(_BITS[weight.element_size()]).flatten().long()
    places = torch.arange(1, bits.numel() + 1, device=bits.device).mul_(
        0x9E3779B97F4A7C1
    )  # wraps round, as the sum does
    return tuple(weight.shape), weight.dtype, int((bits * (places | 1)).sum())


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
