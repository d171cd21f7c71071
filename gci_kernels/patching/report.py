"""report: what runs in the adapted layers of a model, as it is now."""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from rich.table import Table
from torch import nn

from gci_kernels.models import experts, parents
from gci_kernels.patching import peft_layers
from gci_kernels.tuners import fusion, hooks, published_loki
from gci_kernels.tuners.lora import is_plain_lora

_TOKENS = 2048  # for which a layer's plan is reported


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
    read, not_running = parents.readers(model) if rows else {}, dict(peft_layers.not_running(modules))
    for n, row in enumerate(rows):
        reason = next((why for prefix, why in not_running.items() if f"{row.name}.".startswith(prefix)), None)
        if reason is None and row.name in read:
            reason = parents.reason(read[row.name])
        if reason is not None:
            rows[n] = replace(row, base="own call: declined", plan=None, decode=None, declined=reason)
    return Report(rows + _frozen_experts(model))


def _frozen_experts(model: nn.Module) -> list[LayerReport]:
    """Rows for a mixture's stacked experts that the model's adapters leave out."""
    configs = [config for module in model.modules() for config in (vars(module).get("peft_config") or {}).values()]
    rows: dict[str, LayerReport] = {}
    for config in configs:
        for stacks in experts.left_out(model, config):
            shape = ", ".join(f"{name} {list(p.shape)}" for name, p in stacks.parameters.items())
            dtype = _short(next(iter(stacks.parameters.values())).dtype)
            why = "these experts are stacks, which no target reaches: they stay frozen"
            rows.setdefault(stacks.name, LayerReport(stacks.name, "none", shape, dtype, "own call: frozen", None, why))
    return list(rows.values())


def _layer_report(name: str, module: Any) -> LayerReport | None:
    """None: the module is no adapted layer."""
    published, of_peft = published_loki.is_published_layer(module), isinstance(module, BaseTunerLayer)
    if not published and not of_peft:
        return None
    if published:
        method, shape, dtype = published_loki.describe(module)
        declined = peft_layers.replaced_forward(module) or published_loki.published_obstacle(module)
        patched, base_obstacle = isinstance(module, published_loki.FusedPublishedLayer), None
    else:
        method, shape, dtype = peft_layers.describe(module)
        declined = peft_layers.obstacle(module, active_only=True)
        patched, base_obstacle = not is_plain_lora(module), fusion.obstacle(module.base_layer)
    if declined is None and not patched:
        declined = "not patched: call gci_kernels.patch(model)"
    plan, decode = (None, None) if declined is not None else _plans(module, dtype)
    base = "fused" if base_obstacle is None and declined is None else f"own call: {base_obstacle or 'declined'}"
    return LayerReport(name, method, shape, _short(dtype), base, plan, declined, decode)


def _plans(module: Any, dtype: torch.dtype | None) -> tuple[str, str | None]:
    """What a fused layer says that it runs: for a batch of tokens, and for a decoding step."""
    first = next(each for each in module.parameters() if each.is_floating_point())  # quantised weights are not
    device = hooks.device_of(getattr(module, "base_layer", module), first.device).type
    dtype = dtype or first.dtype
    try:
        plan = str(module.plan(_TOKENS, dtype, device))
    except ValueError as error:  # what was asked for in patch cannot run, and the layer's forward says so too
        plan = f"raises: {error}"
    decode = module.decode_plan(dtype, device)
    if isinstance(module, BaseTunerLayer) and (module.disable_adapters or module.merged):
        plan += " (now: base layer alone, adapters disabled or merged)"
    if module._forward_hooks or module._forward_pre_hooks:
        plan += " (between hooks of the layer)"
    return plan, None if decode is None else str(decode)


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype or "quantised").removeprefix("torch.")
