"""PEFT's LoRA linear layers with a fused forward. The instance changes its class and nothing else."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from gci_kernels.class_swap import Swapped, add_mixin, subclass
from gci_kernels.ops.arguments import new_record
from gci_kernels.ops.bottleneck import adapted_linear, choose_plan
from gci_kernels.ops.bottleneck.mixers import IDENTITY
from gci_kernels.ops.bottleneck.shared_input import Arguments
from gci_kernels.ops.decode import Group
from gci_kernels.tuners import fusion, hooks, mixed, shared_input
from gci_kernels.tuners.fused_layer import FusedLayer, among
from gci_kernels.tuners.merging import ExactMerge
from gci_kernels.tuners.scaling import applied, number

# PEFT's layers that compute base(x) + scaling * B(A(dropout(x))), and differ in how they merge: one for each kind of
# base layer. By name, because most of their modules cannot be imported without the library they are for.
_PLAIN = {
    "layer.Linear", "bnb.Linear4bit", "bnb.Linear8bitLt", "torchao.TorchaoLoraLinear", "hqq.HqqLoraLinear",
    "gptq.GPTQLoraLinear", "awq.AwqLoraLinear", "aqlm.AqlmLoraLinear", "eetq.EetqLoraLinear",
}  # fmt: skip


def lora_obstacle(layer: Any, name: str, *, hooked: bool = True) -> str | None:
    """Why adapter `name` of a PEFT LoRA layer has to run through PEFT's own forward, or None where it is fused.

    With `hooked` False hooks of accelerate, which may be taken away again, are no reason.
    """
    variant = layer.lora_variant.get(name)
    if variant is not None:
        return f"adapter {name!r} uses {type(variant).__name__}, which changes the formula"
    modules: dict[str, Any] = layer._modules
    dropout = modules["lora_dropout"]._modules[name]
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"adapter {name!r} has dropout of type {type(dropout).__name__}"
    for part in ("lora_A", "lora_B"):
        module = modules[part]._modules[name]
        if fusion.is_plain(module):
            continue
        reason = fusion.obstacle(module)
        if reason is not None and (hooked or hooks.HOOK not in vars(module)):
            return f"adapter {name!r}: {reason}"
    return None


_NOTHING = (None,) * 4  # no mixer's weights, segments, past, seed


class FusedLora(FusedLayer, ExactMerge):
    """Mixin for a LoRA linear layer of PEFT whose forward becomes :func:`gci_kernels.ops.lora_linear`.

    A base layer that is no plain torch.nn.Linear, a quantised one above all, runs its own product, to which the
    adapters are added. Merged and disabled calls, and adapters that PEFT computes by another formula (DoRA and its
    kin), run PEFT's own forward; `gci_kernels.report` names them. The adapter's products take x as it is and sum in a
    wider dtype, where PEFT converts x to the adapter's dtype first.
    """

    gci_impl = "auto"  # of the op; gci_kernels.patch sets another on the instance
    own: ClassVar[tuple[str, ...]] = ("gci_impl", *ExactMerge.own)

    def adapters(self) -> Sequence[str]:
        """The active adapters that the layer has."""
        return among(self._active_adapter, self.lora_A)

    def forward(
        self, own_forward: Callable[..., Tensor], x: Tensor, *args: Any, adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """As PEFT's: x [..., in] -> [..., out]."""
        mix = None if mixed.thread.state.batch is None else mixed.current(self)
        if adapter_names is not None:
            mix = mixed.MixedBatch(adapter_names)
        if mix is not None:
            return self._mixed(own_forward, x, mix, *args, **kwargs)
        if args or kwargs or self._disable_adapters or self.merged_adapters:
            return own_forward(self, x, *args, **kwargs)
        names = self._active_adapter
        present = self._modules["lora_A"]._modules
        if type(names) is str or len(names) != 1 or names[0] not in present:  # rare
            names = among(names, present)
        for name in names:
            if lora_obstacle(self, name) is not None:
                return own_forward(self, x)
        return self._adapted(x, names)

    def _mixed(
        self, own_forward: Callable[..., Tensor], x: Tensor, mix: mixed.MixedBatch, *args: Any, **kwargs: Any
    ) -> Tensor:
        names = mix.expanded(x.shape[0]) if mix.fits(x, self) else mix.names
        self._check_forward_args(x, *args, adapter_names=names, **kwargs)  # PEFT's own words for what is wrong
        mix.check(x, self)
        fused = all(lora_obstacle(self, name) is None for name in set(mix.names) & self.lora_A.keys())
        if args or kwargs or self.disable_adapters or self.merged or not fused:
            return own_forward(self, x, *args, adapter_names=names, **kwargs)
        return self._run_mixed(x, mix.names, self.lora_A)

    def _matrices(self, name: str) -> tuple[Any, Any, Any]:
        """A, B and B's bias, looked up without the cost of nn.Module.__getattr__."""
        modules = self._modules
        A, B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        try:
            return A._parameters["weight"], B._parameters["weight"], B._parameters["bias"]
        except KeyError:  # a replica of torch.nn.DataParallel, whose parameters are plain attributes
            return A.weight, B.weight, B.bias

    def _arguments(
        self, x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor
    ) -> Arguments:
        """The arguments of the adapter's adapted_linear."""
        dropout, scaling = self._modules["lora_dropout"]._modules[name], self.scaling[name]
        if type(scaling) is not float:
            scaling, B = applied(scaling, B)
        p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        return (x, weight, bias, A, B, *_NOTHING), IDENTITY, (), scaling, p, self.gci_impl

    def _update(self, x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        A, B, extra = self._matrices(name)
        if extra is None:
            arguments = self._arguments(x, name, weight, bias, A, B)
            return adapted_linear(*arguments, shared_input.share, self)[0]
        extra = (extra * self.scaling[name]).to(x.dtype)
        if weight is not None:
            bias, extra = extra if bias is None else bias + extra, None
        y = adapted_linear(*self._arguments(x, name, weight, bias, A, B))[0]
        return y if extra is None else y + extra.to(y.dtype)

    def shared_arguments(self, x: Tensor) -> Arguments | None:
        """See :class:`FusedLayer`."""
        names = () if self._disable_adapters or self.merged_adapters else self.adapters()
        if len(names) != 1 or lora_obstacle(self, names[0]) is not None:
            return None
        found, (A, B, extra) = fusion.shared_operands(self.base_layer), self._matrices(names[0])
        return None if found is None or extra is not None else self._arguments(x, names[0], *found, A, B)

    def plan(self, tokens: int, dtype: torch.dtype, device_type: str) -> str:
        """What the layer runs for x [tokens, in]; ValueError where its `impl` cannot run."""
        return str(choose_plan(self.gci_impl, tokens, dtype, device_type, IDENTITY.name))

    def _group(self, name: str, count: int, first: int = 0) -> Group | None:
        dropout, scaling = self._modules["lora_dropout"]._modules[name], self.scaling[name]
        if type(scaling) is not float:
            scaling = number(scaling)
        A, B, bias = self._matrices(name)
        if bias is not None or scaling is None or dropout.training and type(dropout) is nn.Dropout and dropout.p:
            return None
        return new_record(Group, (A, B, scaling, first, count, None, None, None, 1, False))


# What a patched peft.tuners.lora.Linear is.
FusedLoraLinear = subclass(lora.Linear, FusedLora)


def is_plain_lora(module: nn.Module) -> bool:
    """Whether `module` is exactly one of PEFT's linear LoRA layers that :func:`swap` knows, and not swapped yet."""
    kind = type(module)
    package, _, name = f"{kind.__module__}.{kind.__name__}".partition(".lora.")
    return package == "peft.tuners" and name in _PLAIN and not isinstance(module, FusedLora)


class FusedLoraModel(Swapped):
    """Mixin for PEFT's tuner: mixed batches of the layers above stay in their thread; see tuners/mixed.py."""

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None or not self._takes(names):
            # Which raises where there are names.
            with super()._enable_peft_forward_hooks(*args, adapter_names=names, **kwargs), shared_input.forward():
                yield
            return
        taking: Any = (lora.LoraLayer, AuxiliaryTrainingWrapper)
        fused = mixed.enabled(self, names, args, kwargs, (FusedLora,), taking)
        with super()._enable_peft_forward_hooks(*args, **kwargs), fused:
            yield

    def _takes(self, names: object) -> bool:
        """Whether PEFT has nothing against the names."""
        if self.training or not isinstance(names, (list, tuple)):
            return False
        layers = (module for module in self.modules() if isinstance(module, lora.LoraLayer))
        known = {name for layer in layers for name in (*layer.lora_A, *layer.lora_embedding_A)}
        return set(names) <= known | {mixed.BASE}


def place(model: nn.Module, config: LoraConfig, name: str) -> None:
    """Makes the adapter `name` anew where an offloaded base layer computes: PEFT leaves it on the meta device.

    Raises:
        ValueError: it has parts beside A and B, whose values are lost.
    """
    layers: list[tuple[str, Any]] = [each for each in model.named_modules() if isinstance(each[1], lora.LoraLayer)]
    for path, layer in layers:
        if name not in layer.lora_A or not layer.lora_A[name].weight.is_meta:
            continue
        base: Any = layer.get_base_layer()
        if not hooks.is_offloaded(base):  # a model without values, for the adapter's file to fill
            continue
        for part in (layer.lora_A, layer.lora_B):
            part[name].to_empty(device=hooks.device_of(base, base.weight.device)).reset_parameters()
        with hooks.onloaded(base):
            layer.reset_lora_parameters(name, config.init_lora_weights)
        own = (each for key, each in layer.named_parameters() if "lora_" in key and name in key.split("."))
        if any(each.is_meta for each in own):
            raise ValueError(
                f"{path} is offloaded, and this kind of LoRA needs its weight: add the adapter before the hooks"
            )


# What a patched peft.tuners.lora.LoraModel is.
FusedLoraTuner = subclass(lora.LoraModel, FusedLoraModel)


def swap_tuners(model: nn.Module) -> None:
    """Gives PEFT's LoRA tuners in `model` their mixin, in place."""
    for module in model.modules():
        if type(module) is lora.LoraModel:
            add_mixin(module, FusedLoraModel)
