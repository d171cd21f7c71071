"""What every layer of a bottleneck adapter does for a decoding step and for a mixed batch; PEFT's LoRA too."""

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor

from gci_kernels.ops.decode import DecodePlan, Group, find_step, plan_groups
from gci_kernels.tuners import fusion, mixed


class DecodingLayer:
    """Mixin; the layer says what its adapters are.

    Attributes:
        gci_impl: what the layer gives its op as `impl`.
        adapters: gives the active adapters that the layer has.
        _update: fusion.Update.
        _group: (name, count, first) -> the adapter as a step takes it, for `count` tokens from its token `first` on.
        _has_step: whether an adapter is one that a step computes as it is now.
    """

    base_layer: Any
    gci_impl: str
    adapters: Callable[[], list[str]]
    _update: fusion.Update
    _group: Callable[..., Group]
    _has_step: Callable[[str], bool]

    def _run(self, x: Tensor, names: list[str]) -> Tensor:
        """base(x) with the updates of all named adapters."""
        step = self._step if fusion.takes_steps(self.gci_impl, x) else None
        return fusion.combine(self.base_layer, x, names, self._update, step)

    def _run_mixed(self, x: Tensor, names: Sequence[str], present: Container[str]) -> Tensor:
        """base(x) with, for the rows of each of `names`, the update of that adapter, where it is `present`."""
        step = self._mixed_step if fusion.takes_steps(self.gci_impl, x) else None
        return mixed.combine(self.base_layer, x, mixed.Tokens(x, names, present), self._add_update, step)

    def _step(
        self, x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None, y: Tensor | None
    ) -> Tensor | None:
        """fusion.Step."""
        if not self._has_step(name):
            return None
        groups = (self._group(name, x.numel() // x.shape[-1]),)  # held, for a step knows addresses alone
        step = find_step(x, weight, bias, groups)
        return None if step is None else step.run(x, y)

    def _mixed_step(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None, tokens: mixed.Tokens
    ) -> Tensor | None:
        """mixed.MixedStep."""
        if not all(map(self._has_step, tokens.samples)):
            return None
        groups = tokens.groups(self._group)
        step = find_step(x, weight, bias, groups, tokens.rows)
        return None if step is None else step.run(x, y)

    def _add_update(self, y: Tensor, x: Tensor, name: str, samples: Tensor) -> Tensor:
        update = self._update(x.index_select(0, samples), name, None, None)
        return y.index_add(0, samples, update.to(y.dtype))

    def decode_plan(self, dtype: torch.dtype, device_type: str) -> DecodePlan | None:
        """What a decoding step of one token launches for the first active adapter, None: the stages of training."""
        names = self.adapters()
        if not names or self.gci_impl not in ("auto", "native") or not self._has_step(names[0]):
            return None
        return plan_groups((self._group(names[0], 1),), 1, dtype, device_type)
