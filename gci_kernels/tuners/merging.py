"""Merges adapters into base weights so that unmerging restores them bit for bit, and keeps what others changed."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gci_kernels.class_swap import Swapped
from gci_kernels.tuners import hooks

Rows = Tensor | slice  # numbers of rows of a weight, [k] int64; a slice: all
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Mergeable(BaseTunerLayer):
    """Mixin for the package's own layers: merging replaces rows of the base layer's weight and entries of its bias.

    Their values before and after merging are kept. Unmerging restores each number that still is as merging left it; a
    number that has been changed since keeps the change.

    Attributes:
        merged_adapters: their names, in order.
        merges: of each, the rows, and by "weight" or "bias" their values before and after.
    """

    unmerges_exactly = True
    method_name: str
    r: dict[str, int]
    in_features: int
    out_features: int
    merged_adapters: list[str]
    merges: list[tuple[Rows, dict[str, tuple[Tensor, Tensor]]]]

    def _check_merge(self, names: Sequence[str]) -> None:
        """ValueError where the adapters `names` cannot be merged together."""

    def _merged(self, name: str, weight: Tensor) -> tuple[Rows, dict[str, Tensor]]:
        """The rows that adapter `name` changes; by "weight" their new values [k, in], by "bias" [k].

        Args:
            weight: the base layer's [out, in].
        """
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the base layer; rows that they do not adapt keep their bits.

        Args:
            safe_merge: first see that the new rows are finite.
            adapter_names: those to be merged; None: the active ones.

        Raises:
            ValueError: the base weight is quantised, the method's update is no fixed change of the weight, adapters
                share a row, or `safe_merge` found a NaN.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.r]
        self._check_merge([*self.merged_adapters, *names])
        with self._writable(names) as targets:
            for name in names:
                rows, new = self._merged(name, targets["weight"])
                if safe_merge and not torch.isfinite(new["weight"]).all():
                    # in PEFT's words
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                before = {part: targets[part][rows].clone() for part in new}
                for part, values in new.items():
                    targets[part][rows] = values.to(targets[part].dtype)
                self.merges.append((rows, {part: (old, targets[part][rows].clone()) for part, old in before.items()}))
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Restores the base layer's numbers bit for bit; those changed while merged keep the change."""
        self._check_merge([])
        with self._writable(self.merged_adapters) as targets:
            while self.merged_adapters:
                self.merged_adapters.pop()
                rows, changed = self.merges.pop()
                for part, values in changed.items():
                    target = targets[part]
                    (before, after), now = (each.to(target) for each in values), target[rows]
                    kept = (now == after) | (now.isnan() & after.isnan())
                    target[rows] = torch.where(kept, before, before + (now - after))

    @contextlib.contextmanager
    def _writable(self, names: Sequence[str]) -> Any:
        """The base layer's weight [out, in] and bias, on the device where it computes and to be written to."""
        base: Any = self.get_base_layer()
        weight = getattr(base, "weight", None)
        if not names:
            yield {}
            return
        if type(weight) not in (nn.Parameter, Tensor):
            kind = type(base if weight is None else weight).__name__
            raise ValueError(f"{self.method_name} cannot be merged into a {kind}: use unload()")
        with onload_layer(self) if hooks.is_offloaded(base) else contextlib.nullcontext(), torch.no_grad():
            weight = base.weight.detach().t() if isinstance(base, Conv1D) else base.weight.detach()
            if weight.shape != (self.out_features, self.in_features):
                raise ValueError(f"{self.method_name} cannot be merged into weights {list(weight.shape)}: use unload()")
            yield {"weight": weight, "bias": None if base.bias is None else base.bias.detach()}


class ExactMerge(Swapped):
    """Mixin for a LoRA layer of PEFT, which unmerges by subtracting what it has added: that rounds.

    While an adapter is merged, the layer keeps a copy of its base layer's weights. A weight that was changed while it
    was merged is unmerged by subtracting, which keeps the change. Quantised weights, which merging quantises again, are
    left to PEFT; `gci_rounded` is then True.

    Attributes:
        gci_unmerged: of a merged layer, the base weights before merging, and fingerprints of the merged ones.
        gci_rounded: whether a merge has changed the base weights in a way that unmerging cannot restore exactly.
    """

    unmerges_exactly = True
    own: ClassVar[tuple[str, ...]] = ("gci_unmerged", "gci_rounded")
    gci_unmerged: Mapping[str, tuple[Tensor, tuple]] = {}
    gci_rounded = False

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, which first copies the base layer's weights."""
        if self.merged:
            unmerged = self._unmerged()
        else:
            unmerged = {name: p.detach().clone() for name, p in _weights(self).items() if type(p) is nn.Parameter}
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if self.merged:
            weights = _weights(self)
            self.gci_unmerged = {name: (old, _fingerprint(weights[name])) for name, old in unmerged.items()}
            self.gci_rounded = self.gci_rounded or unmerged.keys() != weights.keys()

    def unmerge(self) -> None:
        """PEFT's; then the copies are written back to the weights that are as merging left them."""
        unmerged = self._unmerged()
        super().unmerge()
        if not self.merged:
            self.gci_unmerged = {}
            for name, old in unmerged.items():
                _weights(self)[name].data.copy_(old)

    def _unmerged(self) -> dict[str, Tensor]:
        """The copies of those weights that are as merging left them."""
        kept, weights = self.gci_unmerged, _weights(self)
        return {n: old for n, (old, merged) in kept.items() if n in weights and _fingerprint(weights[n]) == merged}


def _fingerprint(weight: Tensor) -> tuple:
    """Shape, dtype, and a sum of all numbers' bits weighted by their positions: another one for a changed weight."""
    bits = weight.detach().contiguous().view(_BITS[weight.element_size()]).flatten().long()
    factors = torch.arange(1, bits.numel() + 1, device=bits.device).mul_(0x9E3779B97F4A7C1)  # wraps around, as the sum
    return tuple(weight.shape), weight.dtype, int((bits * (factors | 1)).sum())


def _weights(layer: Any) -> dict[str, Tensor]:
    """What merging may write to: the base layer's parameters, or only the one that is adapted itself."""
    base = layer.get_base_layer()
    only = getattr(layer, "parameter_name", None)
    return {n: p for n, p in base._parameters.items() if p is not None and not p.is_meta and only in (None, n)}


def inside_attention(model: nn.Module) -> set[int]:
    """The ids of the LoRA layers within PEFT's MultiheadAttention, which merges them itself around every call."""
    layers = (module for module in model.modules() if isinstance(module, MultiheadAttention))
    return {id(layer.base_layer.out_proj) for layer in layers}
