"""PEFT's LoRA linear layers with a fused forward. The instance changes its class and nothing else."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peft.tuners import lora
from torch import Tensor, nn

from gci_kernels.ops import lora_linear
from gci_kernels.ops.decode import Group
from gci_kernels.swapped import Swapped, subclass
from gci_kernels.tuners import fusion
from gci_kernels.tuners.decoding import DecodingLayer
from gci_kernels.tuners.merging import ExactMerge

# PEFT's layers that compute base(x) + scaling * B(A(dropout(x))), and differ in how they merge: one for each kind of
# base layer. By name, because most of their modules cannot be imported without the library they are for.
_PLAIN = {
    "layer.Linear", "bnb.Linear4bit", "bnb.Linear8bitLt", "torchao.TorchaoLoraLinear", "hqq.HqqLoraLinear",
    "gptq.GPTQLoraLinear", "awq.AwqLoraLinear", "aqlm.AqlmLoraLinear", "eetq.EetqLoraLinear",
}  # fmt: skip


def lora_obstacle(layer: lora.LoraLayer, name: str) -> str | None:
    """Why adapter `name` of a PEFT LoRA layer has to run through PEFT's own forward, or None where it is fused."""
    variant = layer.lora_variant.get(name)
    if variant is not None:
        return f"adapter {name!r} uses {type(variant).__name__}, which changes the formula"
    dropout = _part(layer, "lora_dropout", name)
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"adapter {name!r} has dropout of type {type(dropout).__name__}"
    reason = fusion.obstacle(_part(layer, "lora_A", name)) or fusion.obstacle(_part(layer, "lora_B", name))
    return None if reason is None else f"adapter {name!r}: {reason}"


def _part(layer: Any, part: str, name: str) -> Any:
    """layer.<part>[name], without what looking it up costs by way of two modules."""
    return layer._modules[part]._modules[name]


if TYPE_CHECKING:  # what the mixin is mixed with
    _Layer = lora.Linear
else:
    _Layer = object


class FusedLora(DecodingLayer, ExactMerge, Swapped, _Layer):
    """Mixin for a LoRA linear layer of PEFT whose forward becomes :func:`gci_kernels.ops.lora_linear`.

    A base layer that is no plain torch.nn.Linear, a quantised one above all, runs its own product, to which the
    adapters are added. Merged and disabled calls, and adapters that PEFT computes by another formula (DoRA and its
    kin), run PEFT's own forward; `gci_kernels.report` names them. The adapter's products take x as it is and sum in a
    wider dtype, where PEFT converts x to the adapter's dtype first.
    """

    gci_impl = "auto"  # of the op; gci_kernels.patch sets another on the instance

    def obstacle(self) -> str | None:
        """Why the active adapters are not fused, or None."""
        for name in self.adapters():
            reason = lora_obstacle(self, name)
            if reason is not None:
                return reason
        return None

    def _present(self) -> dict[str, Any]:
        modules: dict[str, Any] = self._modules
        return modules["lora_A"]._modules

    def adapters(self) -> list[str]:
        present = self._present()
        return [name for name in self.active_adapters if name in present]

    def forward(  # type: ignore[override]  # swapped.subclass gives own_forward
        self, own_forward: Callable[..., Tensor], x: Tensor, *args, adapter_names: list[str] | None = None, **kwargs
    ) -> Tensor:
        if adapter_names is not None:
            return self._mixed(own_forward, x, *args, adapter_names=adapter_names, **kwargs)
        if args or kwargs or self.disable_adapters or self.merged or self.obstacle() is not None:
            return own_forward(self, x, *args, **kwargs)
        return self._run(x, self.adapters())

    def _mixed(
        self, own_forward: Callable[..., Tensor], x: Tensor, *args, adapter_names: list[str], **kwargs
    ) -> Tensor:
        self._check_forward_args(x, *args, adapter_names=adapter_names, **kwargs)
        present = self._present()
        fused = all(lora_obstacle(self, name) is None for name in set(adapter_names) & present.keys())
        if args or kwargs or self.disable_adapters or self.merged or not fused:
            return own_forward(self, x, *args, adapter_names=adapter_names, **kwargs)
        return self._run_mixed(x, adapter_names, present)

    def _update(self, x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        scaling, extra = self.scaling[name], _part(self, "lora_B", name).bias
        if extra is not None:
            extra = (extra * scaling).to(x.dtype)
            if weight is not None:
                bias, extra = extra if bias is None else bias + extra, None
        A, B = (_part(self, part, name).weight for part in ("lora_A", "lora_B"))
        y = lora_linear(
            x, weight, bias, A, B, scaling=scaling, dropout_p=self._dropout_p(name), impl=self.gci_impl
        )  # fmt: skip
        return y if extra is None else y + extra.to(y.dtype)

    def _dropout_p(self, name: str) -> float:
        dropout = _part(self, "lora_dropout", name)
        return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0

    def _has_step(self, name: str) -> bool:
        return _part(self, "lora_B", name)._parameters.get("bias") is None and not self._dropout_p(name)

    def _group(self, name: str, count: int, first: int = 0) -> Group:
        A, B = (fusion.operands(_part(self, part, name))[0] for part in ("lora_A", "lora_B"))
        return Group(A, B, self.scaling[name], first, count)


# What a patched peft.tuners.lora.Linear is.
FusedLoraLinear = subclass(lora.Linear, FusedLora)


def is_plain_lora(module: nn.Module) -> bool:
    """Whether `module` is exactly one of PEFT's linear LoRA layers that :func:`swap` knows, and not swapped yet."""
    kind = type(module)
    package, _, name = f"{kind.__module__}.{kind.__name__}".partition(".lora.")
    return package == "peft.tuners" and name in _PLAIN and not isinstance(module, FusedLora)


def swap(module: Any) -> None:
    """Gives one of PEFT's linear LoRA layers the fused forward, in place."""
    kind: Any = type(module)
    module.__class__ = subclass(kind, FusedLora)


def swap_back(module: Any) -> None:
    """Undoes :func:`swap`."""
    if isinstance(module, ExactMerge):
        module.forget_unmerged()
    vars(module).pop("gci_impl", None)
    module.__class__ = module._gci_parts[0]
