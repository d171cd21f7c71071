"""Describes layers of PEFT and of the package for patch and report, and says why one cannot be fused."""

from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from gci_kernels.tuners import AdaptedLinear, hooks, sharding
from gci_kernels.tuners.lora import FusedLora, is_plain_lora, lora_obstacle


def obstacle(module: Any, *, active_only: bool = False) -> str | None:
    """Why none of a layer's adapters (or one of its active ones) can be fused, or None where they can, or are."""
    if (reason := replaced_forward(module)) is not None:
        return reason
    if isinstance(module, AdaptedLinear):
        return None
    if not isinstance(module, FusedLora) and not is_plain_lora(module):
        return f"{type(module).__module__.removeprefix('peft.tuners.')}.{type(module).__name__} has no fused form"
    if sharding.is_tensor_parallel(module.get_base_layer()):
        return "tensor parallelism has divided its weight among processes, which PEFT's own forward knows of"
    names = [name for name in module.lora_A if not active_only or name in module.active_adapters]
    found = (lora_obstacle(module, name, hooked=active_only) for name in names)
    reasons = [reason for reason in found if reason is not None]
    return reasons[0] if reasons and (active_only or len(reasons) == len(names)) else None


def replaced_forward(module: nn.Module) -> str | None:
    """Whose forward was set on the instance and runs instead of its class's, or None."""
    own, old = vars(module).get("forward"), vars(module).get("_old_forward")
    # accelerate leaves the class's own forward there when its hooks are removed; its hooks call `_old_forward`.
    if own is None or hooks.is_class_forward(module, own) or hooks.is_class_forward(module, old):
        return None
    if old is not None:
        return "an accelerate hook that is older than the patch calls the forward that it found"
    owner = type(own.__self__).__name__ if isinstance(own, MethodType) and own.__self__ is not module else None
    return f"its forward is replaced on the instance{f' by that of {owner}' if owner else ''}"


def describe(module: Any) -> tuple[str, str, torch.dtype | None]:
    """Method, shape, and the dtype of the weight that is adapted; None where it is quantised."""
    return _method(module), _shape(module), _dtype(module)


def _method(module: Any) -> str:
    if isinstance(module, AdaptedLinear):
        return f"{module.method_name} " + ", ".join(map(module.describe, module.r))
    if isinstance(module, lora.LoraLayer):
        ranks = ", ".join(f"r={rank}" for rank in module.r.values())
        return f"LoRA {ranks}" + (f" of {module.parameter_name}" if isinstance(module, ParamWrapper) else "")
    return type(module).__name__


def _shape(module: Any) -> str:
    """The layer's sizes where it has them, else the shape of its weight."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if None not in sizes:
        stacked = isinstance(module, ParamWrapper) and module.num_experts > 1
        return (f"{module.num_experts} x " if stacked else "") + f"{sizes[0]} -> {sizes[1]}"
    weight = getattr(module.get_base_layer(), "weight", None)
    return "unknown" if weight is None else " x ".join(map(str, weight.shape))


def _dtype(module: Any) -> torch.dtype | None:
    if isinstance(module, ParamWrapper):
        return module.get_param().dtype
    base = module.get_base_layer()
    weight = base.in_proj_weight if isinstance(base, nn.MultiheadAttention) else getattr(base, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.dtype
    return getattr(base, "compute_dtype", None)  # what it is dequantised to


def not_running(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Prefixes of the names of layers that PEFT does not run, with the reason; `modules`: all of a model, by name.

    These are the parts of an attention that PEFT merges, and of a module that is trained whole all but one copy.
    """
    for name, module in modules.items():
        if isinstance(module, MultiheadAttention):
            yield f"{name}.base_layer.out_proj.", f"PEFT merges it for every call of {name}"
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        copies = () if module.disable_adapters else set(module.active_adapters) & set(module.modules_to_save)
        running = next(iter(copies), None)
        if running is not None:
            yield (
                f"{name}.original_module.",
                f"it does not run: the copy that modules_to_save trains for {running!r} does",
            )
        for adapter in module.modules_to_save:
            if adapter != running:
                yield f"{name}.modules_to_save.{adapter}.", f"it does not run: {adapter!r} is not active"
