"""Merges PEFT's LoRA into base weights so that unmerging restores them bit for bit."""

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor, nn

if TYPE_CHECKING:  # what the mixin is mixed with
    _Layer = lora.Linear
else:
    _Layer = object

# Attributes of a merged layer: its base weights before merging, fingerprints of the merged ones, and whether unmerging
# rounds. They are attributes of the instance because the layer is PEFT's and only its class is ours.
_UNMERGED, _FINGERPRINTS, _ROUNDED = "_gci_unmerged", "_gci_merged", "_gci_rounded"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ExactMerge(_Layer):
    """Mixin for a LoRA layer of PEFT, which unmerges by subtracting what it has added: that rounds.

    While an adapter is merged, the layer keeps a copy of its base layer's weights. A weight that was changed while it
    was merged is unmerged by subtracting, which keeps the change. Quantised weights, which merging quantises again, are
    left to PEFT; :func:`rounds` is then True.
    """

    unmerges_exactly = True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, which first copies the base layer's weights."""
        if self.merged:
            unmerged = self._unmerged()
        else:
            unmerged = {name: p.detach().clone() for name, p in _weights(self).items() if type(p) is nn.Parameter}
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if self.merged:
            weights = _weights(self)
            vars(self)[_UNMERGED] = unmerged
            vars(self)[_FINGERPRINTS] = {name: _fingerprint(weights[name]) for name in unmerged}
            vars(self)[_ROUNDED] = rounds(self) or unmerged.keys() != weights.keys()

    def unmerge(self) -> None:
        """PEFT's; then the copies are written back to the weights that are as merging left them."""
        unmerged = self._unmerged()
        super().unmerge()
        if not self.merged:
            vars(self).pop(_UNMERGED, None)
            for name, old in unmerged.items():
                _weights(self)[name].data.copy_(old)

    def _unmerged(self) -> dict[str, Tensor]:
        """The copies of those weights that are as merging left them."""
        weights, fingerprints = _weights(self), vars(self).get(_FINGERPRINTS, {})
        copies = vars(self).get(_UNMERGED, {})
        return {n: t for n, t in copies.items() if n in weights and _fingerprint(weights[n]) == fingerprints[n]}

    def forget_unmerged(self) -> None:
        """Drops the copies, for a layer that gets its own class back."""
        for name in (_UNMERGED, _FINGERPRINTS, _ROUNDED):
            vars(self).pop(name, None)


def _fingerprint(weight: Tensor) -> tuple:
    """Shape, dtype, and a sum of all numbers' bits weighted by their positions: another one for a changed weight."""
    bits = weight.detach().contiguous().view(_BITS[weight.element_size()]).flatten().long()
    factors = torch.arange(1, bits.numel() + 1, device=bits.device).mul_(0x9E3779B97F4A7C1)  # wraps around, as the sum
    return tuple(weight.shape), weight.dtype, int((bits * (factors | 1)).sum())


def rounds(layer: nn.Module) -> bool:
    """Whether a merge has changed the layer's base weights in a way that unmerging cannot restore exactly."""
    return bool(vars(layer).get(_ROUNDED))


def _weights(layer: Any) -> dict[str, Tensor]:
    """What merging may write to: the base layer's parameters, or only the one that is adapted itself."""
    base = layer.get_base_layer()
    only = getattr(layer, "parameter_name", None)
    return {n: p for n, p in base._parameters.items() if p is not None and not p.is_meta and only in (None, n)}


def inside_attention(model: nn.Module) -> set[int]:
    """The ids of the LoRA layers within PEFT's MultiheadAttention, which merges them itself around every call."""
    layers = (module for module in model.modules() if isinstance(module, MultiheadAttention))
    return {id(layer.base_layer.out_proj) for layer in layers}
