"""PEFT's LoRA linear layer with a fused forward. The instance changes its class and nothing else."""

import torch
from peft.tuners import lora
from torch import Tensor, nn

from gci_kernels.ops import lora_linear
from gci_kernels.ops.decode import DecodePlan, Group, find_step, plan_groups
from gci_kernels.tuners import fusion, mixed


def lora_obstacle(layer: lora.Linear, name: str) -> str | None:
    """Why adapter `name` of a PEFT LoRA layer has to run through PEFT's own forward, or None where it is fused."""
    variant = layer.lora_variant.get(name)
    if variant is not None:
        return f"adapter {name!r} uses {type(variant).__name__}, which changes the formula"
    dropout = _part(layer, "lora_dropout", name)
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"adapter {name!r} has dropout of type {type(dropout).__name__}"
    reason = fusion.obstacle(_part(layer, "lora_A", name)) or fusion.obstacle(_part(layer, "lora_B", name))
    return None if reason is None else f"adapter {name!r}: {reason}"


def _part(layer: lora.Linear, part: str, name: str) -> nn.Module:
    """layer.<part>[name], without what looking it up costs by way of two modules."""
    return layer._modules[part]._modules[name]


class FusedLoraLinear(lora.Linear):
    """peft.tuners.lora.Linear whose forward is :func:`gci_kernels.ops.lora_linear`.

    Merged, disabled and mixed-batch calls, and adapters that PEFT computes by another formula (DoRA and its kin), run
    PEFT's own forward; `gci_kernels.report` names them. The adapter's products take x as it is and sum in a wider
    dtype, where PEFT converts x to the adapter's dtype first.
    """

    def obstacle(self) -> str | None:
        """Why the active adapters are not fused, or None."""
        for name in self._present_adapters():
            reason = lora_obstacle(self, name)
            if reason is not None:
                return reason
        return None

    def _present_adapters(self) -> list[str]:
        present = self._modules["lora_A"]._modules
        return [name for name in self.active_adapters if name in present]

    def forward(self, x: Tensor, *args, adapter_names: list[str] | None = None, **kwargs) -> Tensor:
        if adapter_names is not None:
            return self._mixed(x, *args, adapter_names=adapter_names, **kwargs)
        if args or kwargs or self.disable_adapters or self.merged or self.obstacle() is not None:
            return super().forward(x, *args, **kwargs)
        step = self._step if fusion.decodes(x) else None
        return fusion.combine(self.base_layer, x, self._present_adapters(), self._update, step)

    def _mixed(self, x: Tensor, *args, adapter_names: list[str], **kwargs) -> Tensor:
        self._check_forward_args(x, *args, adapter_names=adapter_names, **kwargs)
        present = self._modules["lora_A"]._modules
        fused = all(lora_obstacle(self, name) is None for name in set(adapter_names) & present.keys())
        if args or kwargs or self.disable_adapters or self.merged or not fused:
            return super().forward(x, *args, adapter_names=adapter_names, **kwargs)
        step = self._mixed_step if fusion.decodes(x) else None
        return mixed.combine(self.base_layer, x, mixed.Tokens(x, adapter_names, present), self._add_update, step)

    def _add_update(self, y: Tensor, x: Tensor, name: str, samples: Tensor) -> Tensor:
        update = self._update(x.index_select(0, samples), name, None, None)
        return y.index_add(0, samples, update.to(y.dtype))

    def _update(self, x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        scaling, extra = self.scaling[name], self.lora_B[name].bias
        if extra is not None:
            extra = (extra * scaling).to(x.dtype)
            if weight is not None:
                bias, extra = extra if bias is None else bias + extra, None
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        y = lora_linear(x, weight, bias, A, B, scaling=scaling, dropout_p=self._dropout_p(name))
        return y if extra is None else y + extra

    def _dropout_p(self, name: str) -> float:
        dropout = _part(self, "lora_dropout", name)
        return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0

    def _step(
        self, x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None, y: Tensor | None
    ) -> Tensor | None:
        if not self._has_step(name):
            return None
        step = find_step(x, weight, bias, (self._group(name, x.numel() // x.shape[-1]),))
        return None if step is None else step.run(x, y)

    def _mixed_step(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None, tokens: mixed.Tokens
    ) -> Tensor | None:
        if not all(map(self._has_step, tokens.samples)):
            return None
        step = find_step(x, weight, bias, tokens.groups(self._group), tokens.rows)
        return None if step is None else step.run(x, y)

    def decode_plan(self, dtype: torch.dtype, device_type: str) -> DecodePlan | None:
        """What a decoding step of one token launches for the first active adapter, None: the stages of training."""
        names = self._present_adapters()
        if not names or not self._has_step(names[0]):
            return None
        return plan_groups((self._group(names[0], 1),), 1, dtype, device_type)

    def _has_step(self, name: str) -> bool:
        return _part(self, "lora_B", name)._parameters.get("bias") is None and not self._dropout_p(name)

    def _group(self, name: str, count: int, first: int = 0) -> Group:
        A, B = (fusion.operands(_part(self, part, name))[0] for part in ("lora_A", "lora_B"))
        return Group(A, B, self.scaling[name], first, count)


def is_plain_lora(module: nn.Module) -> bool:
    """Whether `module` is exactly PEFT's linear LoRA layer, the class that :class:`FusedLoraLinear` stands in for."""
    return type(module) is lora.Linear
