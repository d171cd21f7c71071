"""What every layer of a bottleneck adapter does in a call, PEFT's LoRA too: in training, mixed batches and decoding."""

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor

from gci_kernels.ops.bottleneck.shared_input import Arguments
from gci_kernels.ops.decode import DecodePlan, Group, find_step, plan_groups
from gci_kernels.tuners import fusion, hooks, mixed


class FusedLayer:
    """Mixin; the layer says what its adapters are.

    Attributes:
        gci_impl: what the layer gives its op as `impl`.
        adapters: gives the active adapters that the layer has.
        _update: (x, name, weight, bias) -> the adapter's addition, with the base product where a weight is given.
        _group: (name, count, first) -> the adapter as a step takes it, for `count` tokens from its token `first` on;
            None where no step computes it as it is now.
        shared_arguments: x -> the arguments of the layer's adapted_linear if it were called with x now, None where a
            call would be more than that one product; see tuners/shared_input.py.
    """

    base_layer: Any
    gci_impl: str
    adapters: Callable[[], Sequence[str]]
    _update: Callable[[Tensor, str, Tensor | None, Tensor | None], Tensor]
    _group: Callable[..., Group | None]
    shared_arguments: Callable[[Tensor], Arguments | None]

    def _adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """base(x) plus the updates of all named adapters; the first is fused with the base product if it may be."""
        base: Any = self._modules["base_layer"]  # type: ignore[attr-defined]  # of the layer that this is mixed with
        if not names:
            return base(x)
        if hooks.HOOK in base.__dict__ and (moved := hooks.devices(base, x)) is not None:
            return self._adapted(x.to(moved[0]), names).to(moved[1])  # so that the base product is fused there
        steps = not torch.is_grad_enabled() and fusion.takes_steps(self.gci_impl, x)
        y = None
        if fusion.is_plain(base):  # nearly every layer: asked here, it saves each call another
            weight, bias = base._parameters["weight"], base._parameters["bias"]
        else:
            weight, bias, y = fusion.base_operands(base, x)
        owned = y is None  # whether y may be written to: a hook may have kept what it saw
        for name in names:
            made = None
            if steps and (y is None or y.dtype == x.dtype):
                if y is not None and not (owned and y.is_contiguous()):
                    y = y.clone(memory_format=torch.contiguous_format)
                made = self._step(x, name, weight, bias, y)
            if made is None:
                made = self._update(x, name, weight, bias)
                made = made if y is None else y + made.to(y.dtype)
            y, owned, weight, bias = made, True, None, None
        return y  # type: ignore[return-value]  # there is a name

    def _run_mixed(self, x: Tensor, names: Sequence[str], present: Container[str]) -> Tensor:
        """base(x) with, for the rows of each of `names`, the update of that adapter, where it is `present`."""
        step = self._mixed_step if fusion.takes_steps(self.gci_impl, x) else None
        return mixed.combine(self.base_layer, x, mixed.Tokens(x, names, present), self._add_update, step)

    def _step(
        self, x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None, y: Tensor | None
    ) -> Tensor | None:
        """:attr:`_update` for a decoding step, in a kernel of its own, or None.

        With y, which holds the base product, instead of a weight it may write into that.
        """
        group = self._group(name, x.numel() // x.shape[-1])  # held, for a step knows addresses alone
        step = None if group is None else find_step(x, weight, bias, (group,))
        return None if step is None else step.run(x, y)

    def _mixed_step(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None, tokens: mixed.Tokens
    ) -> Tensor | None:
        """mixed.MixedStep."""
        groups = tokens.groups(self._group)
        step = None if groups is None else find_step(x, weight, bias, groups, tokens.rows)
        return None if step is None else step.run(x, y)

    def _add_update(self, y: Tensor, x: Tensor, name: str, samples: Tensor) -> Tensor:
        update = self._update(x.index_select(0, samples), name, None, None)
        return y.index_add(0, samples, update.to(y.dtype))

    def decode_plan(self, dtype: torch.dtype, device_type: str) -> DecodePlan | None:
        """What a decoding step of one token launches for the first active adapter, None: the stages of training."""
        names = self.adapters()
        group = self._group(names[0], 1) if names and self.gci_impl in ("auto", "native") else None
        return None if group is None else plan_groups((group,), 1, dtype, torch.device(device_type))


def among(active: str | Sequence[str], present: Container[str]) -> Sequence[str]:
    """The `active` adapters, a name or several as PEFT's layers keep them, that are `present`."""
    names = (active,) if isinstance(active, str) else active
    return [name for name in names if name in present]
