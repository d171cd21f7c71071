"""PEFT's LoRA linear layer with a fused forward. The instance changes its class and nothing else."""

from peft.tuners import lora
from torch import Tensor, nn

from gci_kernels.ops import lora_linear
from gci_kernels.ops.decode import add_update
from gci_kernels.tuners import fusion


def lora_obstacle(layer: lora.Linear, name: str) -> str | None:
    """Why adapter `name` of a PEFT LoRA layer has to run through PEFT's own forward, or None where it is fused."""
    variant = layer.lora_variant.get(name)
    if variant is not None:
        return f"adapter {name!r} uses {type(variant).__name__}, which changes the formula"
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"adapter {name!r} has dropout of type {type(dropout).__name__}"
    for part in (down, up):
        reason = fusion.obstacle(part)
        if reason is not None:
            return f"adapter {name!r}: {reason}"
    return None


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
        return [name for name in self.active_adapters if name in self.lora_A]

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs or self.disable_adapters or self.merged or self.obstacle() is not None:
            return super().forward(x, *args, **kwargs)

        names = self._present_adapters()

        def update(*arguments) -> Tensor:
            return self._update(x, *arguments)

        if fusion.decodes(self.base_layer, x):
            return fusion.decoded(self.base_layer, x, names, lambda y, name: self._add_step(y, x, name), update)
        return fusion.combine(self.base_layer, x, names, update)

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
        dropout = self.lora_dropout[name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def _add_step(self, y: Tensor, x: Tensor, name: str) -> bool:
        down, up = self.lora_A[name], self.lora_B[name]
        if up.bias is not None or self._dropout_p(name):
            return False
        return add_update(y, x, down.weight, None, up.weight, scaling=self.scaling[name])


def is_plain_lora(module: nn.Module) -> bool:
    """Whether `module` is exactly PEFT's linear LoRA layer, the class that :class:`FusedLoraLinear` stands in for."""
    return type(module) is lora.Linear
