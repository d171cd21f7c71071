"""patch, unpatch, report: the whole public surface for models."""

import copy
import re
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.config import PeftConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from rich.console import Console
from rich.table import Table
from torch import nn

from gci_kernels import frozen
from gci_kernels.ops.bottleneck import choose_plan
from gci_kernels.swapped import give_class
from gci_kernels.tuners import AdaptedLinear, BottleneckConfig, LoKIConfig, fusion, hooks, split
from gci_kernels.tuners.lora import (
    FusedLora,
    FusedLoraModel,
    is_plain_lora,
    lora_obstacle,
    place,
    swap,
    swap_back,
    swap_tuners,
)

# Set on the tuner of a model that patch() made from a plain one: the _Undo that gives the plain one back.
_UNDO = "_gci_undo"


class _Absent:
    """Stands for an attribute or key that was not there."""


class _Undo:
    """What was changed in a module tree, and the way back: (module, attribute, key or None, old value) each."""

    def __init__(self, changes: list[tuple[nn.Module, str, Any, Any]], trainable: set[str]) -> None:
        self.changes, self.trainable = changes, trainable

    def apply(self, model: nn.Module) -> None:
        for module, attribute, key, old in self.changes:
            if attribute == "__class__":
                give_class(module, old)
                continue
            # Dictionaries are changed in place: hook handles hold on to them.
            container, key = (vars(module), attribute) if key is None else (vars(module)[attribute], key)
            if old is _Absent:
                container.pop(key, None)
            else:
                container[key] = old
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.trainable)


class _Snapshot:
    """The state of a module tree: classes, attributes, children, hooks and requires_grad, but not tensors' values."""

    def __init__(self, model: nn.Module) -> None:
        self.states = [(module, type(module), self._copy(module)) for module in model.modules()]
        self.trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    @staticmethod
    def _copy(module: nn.Module) -> dict:
        return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}

    def undo(self) -> _Undo:
        """The way back from the present state to this one."""
        changes: list[tuple] = []
        for module, cls, before in self.states:
            if type(module) is not cls:
                changes.append((module, "__class__", None, cls))
            now = vars(module)
            for attribute in before.keys() | now.keys():
                old, new = before.get(attribute, _Absent), now.get(attribute, _Absent)
                if isinstance(old, dict) and isinstance(new, dict):
                    changes += [
                        (module, attribute, key, old.get(key, _Absent))
                        for key in old.keys() | new.keys()
                        if old.get(key, _Absent) is not new.get(key, _Absent)
                    ]
                elif old is not new:
                    changes.append((module, attribute, None, old))
        return _Undo(changes, self.trainable)


def patch(
    model: nn.Module, config: PeftConfig | None = None, *, adapter_name: str = "default", upcast_frozen: bool = False
) -> nn.Module:
    """Fuses a model's adapters, in place; with a config, adds the adapter first. All or nothing.

    Args:
        model: with a config, a plain model, most often from transformers; without, one that has PEFT's LoRA layers or
            the published LoKI repository's layers.
        config: LoRAMoEConfig, ALoRAConfig, LoKIConfig or peft.LoraConfig. The caller's object is not changed.
        adapter_name: the new adapter's name in PEFT.
        upcast_frozen: let the model's frozen torch.nn.Linear layers, the head among them, take float32 products too
            where they are faster: in bfloat16 and float16, on a CPU without instructions for them. They are then more
            exact than PyTorch's and do not give its bits. Off, these layers stay PyTorch's, whatever they cost.

    Returns:
        With a config a PeftModel around `model`; without one `model` itself. A layer whose adapter cannot be fused
        keeps PEFT's own computation and stands in :func:`report` with the reason. Patching twice changes nothing.

    Raises:
        ValueError, TypeError: the model has nothing to patch, or the config does not fit. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    snapshot = _Snapshot(model)
    try:
        peft_model = model if config is None else _add_adapter(model, config, adapter_name)
        if config is None:
            _take_over(model)
        if upcast_frozen:
            frozen.swap_all(peft_model)
    except BaseException:
        snapshot.undo().apply(model)
        raise
    if config is not None:
        setattr(peft_model.base_model, _UNDO, snapshot.undo())
    return peft_model


def _add_adapter(model: nn.Module, config: PeftConfig, adapter_name: str) -> PeftModel:
    if not isinstance(config, (BottleneckConfig, LoKIConfig, LoraConfig)):
        allowed = "LoRAMoEConfig, ALoRAConfig, LoKIConfig or peft.LoraConfig"
        raise TypeError(f"config must be a {allowed}, got {type(config).__name__}")
    if isinstance(model, PeftModel):
        raise ValueError("model is a PeftModel already: use its add_adapter, then patch(model) without a config")
    _check_targets(model, config)
    peft_model = get_peft_model(model, copy.deepcopy(config), adapter_name=adapter_name)
    if isinstance(config, LoraConfig):
        place(peft_model, config, adapter_name)
        _fuse_lora(peft_model)
    return peft_model


def _check_targets(model: nn.Module, config: BottleneckConfig | LoKIConfig | LoraConfig) -> None:
    """PEFT passes over a name that matches nothing as long as another one does; a typing error should not train."""
    names = [name for name, _ in model.named_modules()]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field, None) or ():
            if not any(get_pattern_key([pattern], name) is pattern for name in names):
                raise ValueError(f"{field}: no module matches {pattern!r}")
    if not isinstance(config.target_modules, (list, set, tuple)):
        return
    unknown = [t for t in config.target_modules if not any(name == t or name.endswith("." + t) for name in names)]
    if unknown:
        leaves = {re.sub(r".*\.", "", name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        raise ValueError(f"target_modules: no module is named {sorted(unknown)}; linear layers here: {sorted(leaves)}")


def _take_over(model: nn.Module) -> None:
    """Swaps every layer that has a fused form."""
    published = [module for module in model.modules() if split.is_split(module)]
    for module in published:
        split.swap(module)
    _fuse_lora(model, needed=not published)


def _fuse_lora(model: nn.Module, needed: bool = True) -> None:
    adapted: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    ]
    obstacles = {name: _obstacle(module) for name, module in adapted}
    if needed and all(obstacles.values()):
        found = "; ".join(f"{name}: {reason}" for name, reason in obstacles.items()) or "no adapter layers at all"
        raise ValueError(
            "nothing to patch: looked for linear layers of peft.tuners.lora with an adapter that is plain LoRA and for "
            f"layers of the published LoKI repository, found {found}. Pass a config to add an adapter"
        )
    for _, module in adapted:
        if is_plain_lora(module):
            swap(module)
    swap_tuners(model)


def _obstacle(module: Any, *, active_only: bool = False) -> str | None:
    """Why none of a layer's adapters (or one of its active ones) can be fused, or None where they can, or are."""
    if isinstance(module, AdaptedLinear):
        return None
    if not isinstance(module, FusedLora) and not is_plain_lora(module):
        return f"{type(module).__module__.removeprefix('peft.tuners.')}.{type(module).__name__} has no fused form"
    names = [name for name in module.lora_A if not active_only or name in module.active_adapters]
    found = (lora_obstacle(module, name, hooked=active_only) for name in names)
    reasons = [reason for reason in found if reason is not None]
    return reasons[0] if reasons and (active_only or len(reasons) == len(names)) else None


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes :func:`patch`, and returns what was there before.

    For patch(model, config) that is the plain model, its adapter gone (save it first) and requires_grad as it was; for
    patch(peft_model) it is the PeftModel with PEFT's own layers, trained values kept; the published LoKI layers too.

    Raises:
        ValueError: the model was not patched.
    """
    tuner: Any = model.base_model if isinstance(model, PeftModel) else None
    undo = getattr(tuner, _UNDO, None)
    if undo is not None:
        plain = tuner.model
        undo.apply(plain)
        frozen.swap_back(plain)
        return plain
    fused = [module for module in model.modules() if isinstance(module, (FusedLora, FusedLoraModel))]
    published = [module for module in model.modules() if isinstance(module, split.FusedSplit)]
    if not fused and not published:
        raise ValueError(
            "nothing to unpatch: gci_kernels.patch did not make this model; PEFT's unload() removes adapters"
        )
    for layer in fused:
        swap_back(layer)
    for module in published:
        split.swap_back(module)
    frozen.swap_back(model)
    return model


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
    has another. What a decoding step launches is said of the active adapters' first.
    """
    made = (_layer_report(name, module) for name, module in model.named_modules())
    return Report(layer for layer in made if layer is not None)


def _layer_report(name: str, module: nn.Module) -> LayerReport | None:
    """None: the module is no adapted layer."""
    if split.is_split(module):
        return _split_report(name, module)
    return _adapter_report(name, module) if isinstance(module, BaseTunerLayer) else None


def _split_report(name: str, module: nn.Module) -> LayerReport:
    method, shape, dtype = split.describe(module)
    patched = isinstance(module, split.FusedSplit)
    declined = split.split_obstacle(module) if patched else "not patched: call gci_kernels.patch(model)"
    base, plan = ("fused", "rows=kept") if declined is None else ("own call: declined", None)
    return LayerReport(name, method, shape, str(dtype).removeprefix("torch."), base, plan, declined)


def _adapter_report(name: str, module: Any) -> LayerReport:
    base = module.base_layer
    dtype, declined = fusion.matmul_dtype(base), _obstacle(module, active_only=True)
    if declined is None and is_plain_lora(module):
        declined = "not patched: call gci_kernels.patch(model)"
    obstacle = fusion.obstacle(base)
    if isinstance(module, AdaptedLinear):
        method = f"{module.method_name} " + ", ".join(map(module.describe, module.r))
    elif isinstance(module, lora.LoraLayer):
        method = "LoRA " + ", ".join(f"r={rank}" for rank in module.r.values())
    else:
        method = type(module).__name__
    plan = decode = None
    if declined is None:
        first = next(each for each in module.parameters() if each.is_floating_point())  # quantised weights are not
        device = hooks.device_of(base, first.device).type
        shape: dict[str, Any] = dict(dtype=dtype or first.dtype, device_type=device)
        own = isinstance(module, AdaptedLinear)
        plan = module.plan(2048, **shape) if own else str(choose_plan("auto", tokens=2048, **shape, mixer="identity"))
        decode = module.decode_plan(**shape)
        if module.disable_adapters or module.merged:
            plan += " (now: base layer alone, adapters disabled or merged)"
    return LayerReport(
        name=name,
        method=method,
        shape=f"{module.in_features} -> {module.out_features}",
        dtype=str(dtype or "quantised").removeprefix("torch."),
        base="fused" if obstacle is None and declined is None else f"own call: {obstacle or 'declined'}",
        plan=plan,
        declined=declined,
        decode=None if decode is None else str(decode),
    )
