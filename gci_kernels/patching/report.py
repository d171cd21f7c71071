"""report: what runs in the adapted layers of a model, as it is now."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from rich.console import Console
from rich.table import Table
from torch import nn

from gci_kernels.models import experts, parents
from gci_kernels.ops.bottleneck import choose_plan
from gci_kernels.tuners import AdaptedLinear, fusion, hooks, published_loki
from gci_kernels.tuners.lora import FusedLora, is_plain_lora, lora_obstacle


def obstacle(module: Any, *, active_only: bool = False) -> str | None:
    """Why none of a layer's adapters (or one of its active ones) can be fused, or None where they can, or are."""
    if (reason := _replaced_forward(module)) is not None:
        return reason
    if isinstance(module, AdaptedLinear):
        return None
    if not isinstance(module, FusedLora) and not is_plain_lora(module):
        return f"{type(module).__module__.removeprefix('peft.tuners.')}.{type(module).__name__} has no fused form"
    names = [name for name in module.lora_A if not active_only or name in module.active_adapters]
    found = (lora_obstacle(module, name, hooked=active_only) for name in names)
    reasons = [reason for reason in found if reason is not None]
    return reasons[0] if reasons and (active_only or len(reasons) == len(names)) else None


def _replaced_forward(module: nn.Module) -> str | None:
    """Whose forward stands on the instance and runs instead of its class's, or None."""
    own, kept = vars(module).get("forward"), vars(module).get("_old_forward")
    if own is None or hooks.is_own(module, own):  # accelerate leaves the class's there when its hooks are taken away
        return None
    if kept is not None:  # accelerate's hooks call that between their own parts
        if hooks.is_own(module, kept):
            return None
        return "an accelerate hook that is older than the patch calls the forward that it found"
    owner = type(own.__self__).__name__ if isinstance(own, MethodType) and own.__self__ is not module else None
    return f"its forward is replaced on the instance{f' by that of {owner}' if owner else ''}"


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer: `plan` says which implementation runs each stage, or `declined` why PEFT's own code does.

    `decode` is what a decoding step of one token launches, None where it takes the plan's stages too.
    """

    name: str
    method: str
    shape: str
    dtype: str
    base: str
    plan: str | None
    declined: str | None
    decode: str | None = None


class Report(list[LayerReport]):
    """The adapted layers of a model; printing it gives a table, equal layers in one row."""

    def __str__(self) -> str:
        columns = ("layers", "method", "shape", "dtype", "base product", "plan, or why declined", "decoding step")
        table = Table(*columns, expand=False)
        groups: dict[tuple, list[str]] = {}
        for layer in self:
            pattern = re.sub(r"\.\d+(?=\.|$)", ".*", layer.name)
            plan = layer.plan or f"declined: {layer.declined}"
            row = (pattern, layer.method, layer.shape, layer.dtype, layer.base, plan, layer.decode or "by stages")
            groups.setdefault(row, []).append(layer.name)
        for row, names in groups.items():
            table.add_row(f"{row[0]} x {len(names)}", *row[1:])
        console = Console(width=200)
        with console.capture() as capture:
            console.print(table)
        return capture.get().rstrip()


def report(model: nn.Module) -> Report:
    """What runs where: one :class:`LayerReport` for each adapted layer of `model`, as it is now.

    The plan is the one for 2048 tokens in the base weight's dtype, or that which it is dequantised to; under autocast x
    has another. What a decoding step launches is said of the active adapters' first. Where a mixture's experts are
    stacks that an adapter for its MLPs does not reach, they have rows of their own.
    """
    modules = dict(model.named_modules())
    rows = [row for name, module in modules.items() if (row := _layer_report(name, module)) is not None]
    read, idle = parents.readers(model) if rows else {}, dict(_idle(modules))
    for n, row in enumerate(rows):
        reason = next((why for prefix, why in idle.items() if f"{row.name}.".startswith(prefix)), None)
        if reason is None and row.name in read:
            reason = parents.reason(read[row.name])
        if reason is not None:
            rows[n] = replace(row, base="own call: declined", plan=None, decode=None, declined=reason)
    return Report(rows + _left_out(model))


def _idle(modules: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Prefixes of the names of layers that do not run: PEFT keeps a module and copies of it that are trained whole."""
    for name, module in modules.items():
        if isinstance(module, MultiheadAttention):
            yield f"{name}.base_layer.out_proj.", f"PEFT merges it for every call of {name}"
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        runs = (
            None
            if module.disable_adapters
            else next(iter(set(module.active_adapters) & set(module.modules_to_save)), None)
        )
        if runs is not None:
            yield f"{name}.original_module.", f"it does not run: the copy that modules_to_save trains for {runs!r} does"
        for adapter in module.modules_to_save:
            if adapter != runs:
                yield f"{name}.modules_to_save.{adapter}.", f"it does not run: {adapter!r} is not active"


def _left_out(model: nn.Module) -> list[LayerReport]:
    configs = [config for module in model.modules() for config in (vars(module).get("peft_config") or {}).values()]
    kept: dict[str, LayerReport] = {}
    for config in configs:
        for stacks in experts.left_out(model, config):
            shape = ", ".join(f"{name} {list(p.shape)}" for name, p in stacks.parameters.items())
            dtype = str(next(iter(stacks.parameters.values())).dtype).removeprefix("torch.")
            why = "these experts are stacks, which no target reaches: they stay frozen"
            kept.setdefault(stacks.name, LayerReport(stacks.name, "none", shape, dtype, "own call: frozen", None, why))
    return list(kept.values())


def _layer_report(name: str, module: nn.Module) -> LayerReport | None:
    """None: the module is no adapted layer."""
    if published_loki.is_split(module):
        return _split_report(name, module)
    return _adapter_report(name, module) if isinstance(module, BaseTunerLayer) else None


def _split_report(name: str, module: nn.Module) -> LayerReport:
    method, shape, dtype = published_loki.describe(module)
    patched = isinstance(module, published_loki.FusedSplit)
    declined = published_loki.split_obstacle(module) if patched else "not patched: call gci_kernels.patch(model)"
    declined = _replaced_forward(module) or declined
    base, plan = (
        ("fused", _said(lambda: published_loki.plan(module))) if declined is None else ("own call: declined", None)
    )
    return LayerReport(name, method, shape, str(dtype).removeprefix("torch."), base, plan, declined)


def _said(plan: Callable[[], Any]) -> str:
    try:
        return str(plan())
    except ValueError as error:  # what was asked for in patch cannot run, and the layer's forward says so too
        return f"raises: {error}"


def _adapter_report(name: str, module: Any) -> LayerReport:
    base = module.base_layer
    dtype, declined = _dtype(module), obstacle(module, active_only=True)
    if declined is None and is_plain_lora(module):
        declined = "not patched: call gci_kernels.patch(model)"
    reason = fusion.obstacle(base)
    plan = decode = None
    if declined is None:
        first = next(each for each in module.parameters() if each.is_floating_point())  # quantised weights are not
        device = hooks.device_of(base, first.device).type
        shape: dict[str, Any] = dict(dtype=dtype or first.dtype, device_type=device)
        if isinstance(module, AdaptedLinear):
            plan = _said(lambda: module.plan(2048, **shape))
        else:
            plan = _said(lambda: choose_plan(module.gci_impl, tokens=2048, **shape, mixer="identity"))
        decode = module.decode_plan(**shape)
        if module.disable_adapters or module.merged:
            plan += " (now: base layer alone, adapters disabled or merged)"
        if any(vars(module)[hooks] for hooks in ("_forward_hooks", "_forward_pre_hooks")):
            plan += " (between hooks of the layer)"
    return LayerReport(
        name=name,
        method=_method(module),
        shape=_shape(module),
        dtype=str(dtype or "quantised").removeprefix("torch."),
        base="fused" if reason is None and declined is None else f"own call: {reason or 'declined'}",
        plan=plan,
        declined=declined,
        decode=None if decode is None else str(decode),
    )


def _method(module: Any) -> str:
    if isinstance(module, AdaptedLinear):
        return f"{module.method_name} " + ", ".join(map(module.describe, module.r))
    if isinstance(module, lora.LoraLayer):
        ranks = ", ".join(f"r={rank}" for rank in module.r.values())
        return f"LoRA {ranks}" + (f" of {module.parameter_name}" if isinstance(module, ParamWrapper) else "")
    return type(module).__name__


def _shape(module: Any) -> str:
    """What the layer says of itself, else the shape of its weight."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if None not in sizes:
        stacked = isinstance(module, ParamWrapper) and module.num_experts > 1
        return (f"{module.num_experts} x " if stacked else "") + f"{sizes[0]} -> {sizes[1]}"
    weight = getattr(module.get_base_layer(), "weight", None)
    return "unknown" if weight is None else " x ".join(map(str, weight.shape))


def _dtype(module: Any) -> torch.dtype | None:
    """Of the weight that is adapted; None where it is quantised."""
    if isinstance(module, ParamWrapper):
        return module.get_param().dtype
    base = module.get_base_layer()
    return base.in_proj_weight.dtype if isinstance(base, nn.MultiheadAttention) else fusion.matmul_dtype(base)
