"""patch, unpatch, report: the whole public surface for models."""

import copy
import re
from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model
from peft.config import PeftConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from rich.table import Table
from torch import nn

from gci_kernels.ops.bottleneck import choose_plan
from gci_kernels.tuners import FusedLoraLinear, LoRAMoEConfig, LoRAMoELinear, fusion
from gci_kernels.tuners.lora import is_plain_lora, lora_obstacle

# Set on the tuner of a model that patch() made from a plain one: the names of the parameters that were trainable.
_TRAINABLE_BEFORE = "_gci_trainable_before"


class _Snapshot:
    """The state of a module tree; restoring it undoes whatever was done to modules, hooks and requires_grad since."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(module, type(module), self._copy(module)) for module in model.modules()]
        self.flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    @staticmethod
    def _copy(module: nn.Module) -> dict:
        return {key: copy.copy(value) if isinstance(value, dict) else value for key, value in vars(module).items()}

    def restore(self) -> None:
        for module, cls, state in self.modules:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(state)
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)


def patch(model: nn.Module, config: PeftConfig | None = None, *, adapter_name: str = "default") -> nn.Module:
    """Fuses a model's adapters, in place; with a config, adds the adapter first. All or nothing.

    Args:
        model: with a config, a plain model, most often from transformers; without, one that has PEFT LoRA layers.
        config: LoRAMoEConfig or peft.LoraConfig. The caller's object is not changed.
        adapter_name: the new adapter's name in PEFT.

    Returns:
        With a config a PeftModel around `model`; without one `model` itself. A layer whose adapter cannot be fused keeps
        PEFT's own computation and stands in :func:`report` with the reason. Patching twice changes nothing.

    Raises:
        ValueError, TypeError: the model has nothing to patch, or the config does not fit it. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    snapshot = _Snapshot(model)
    try:
        if config is None:
            _fuse_lora(model)
            return model
        return _add_adapter(model, config, adapter_name)
    except BaseException:
        snapshot.restore()
        raise


def _add_adapter(model: nn.Module, config: PeftConfig, adapter_name: str) -> PeftModel:
    if not isinstance(config, (LoRAMoEConfig, LoraConfig)):
        raise TypeError(f"config must be a LoRAMoEConfig or a peft.LoraConfig, got {type(config).__name__}")
    if isinstance(model, PeftModel):
        raise ValueError("model is a PeftModel already: use its add_adapter, then patch(model) without a config")
    _check_targets(model, config)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    peft_model = get_peft_model(model, copy.deepcopy(config), adapter_name=adapter_name)
    setattr(peft_model.base_model, _TRAINABLE_BEFORE, trainable)
    if isinstance(config, LoraConfig):
        _fuse_lora(peft_model)
    return peft_model


def _check_targets(model: nn.Module, config: PeftConfig) -> None:
    """PEFT passes over a name that matches nothing as long as another one does; a typing error should not train."""
    if not isinstance(config.target_modules, (list, set, tuple)):
        return
    names = [name for name, _ in model.named_modules()]
    unknown = [t for t in config.target_modules if not any(name == t or name.endswith("." + t) for name in names)]
    if unknown:
        leaves = {re.sub(r".*\.", "", name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        raise ValueError(f"target_modules: no module is named {sorted(unknown)}; linear layers here: {sorted(leaves)}")


def _fuse_lora(model: nn.Module) -> None:
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if any(isinstance(module, (FusedLoraLinear, LoRAMoELinear)) for _, module in adapted):
        declined = {}
    else:
        declined = {name: _decline(module) for name, module in adapted}
        if all(declined.values()):
            found = "; ".join(f"{name}: {reason}" for name, reason in declined.items()) or "no adapter layers at all"
            raise ValueError(
                "nothing to patch: looked for peft.tuners.lora.Linear layers whose adapters are plain LoRA, found "
                f"{found}. Pass a config to add an adapter"
            )
    for _, module in adapted:
        if is_plain_lora(module):
            module.__class__ = FusedLoraLinear


def _decline(module: BaseTunerLayer) -> str | None:
    """Why an adapted layer stays PEFT's, or None where it is, or can be, fused."""
    if isinstance(module, LoRAMoELinear):
        return None
    if not isinstance(module, FusedLoraLinear) and not is_plain_lora(module):
        return f"{type(module).__module__.removeprefix('peft.tuners.')}.{type(module).__name__} has no fused form"
    reasons = (lora_obstacle(module, name) for name in module.active_adapters if name in module.lora_A)
    return next((reason for reason in reasons if reason is not None), None)


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes :func:`patch`, and returns what was there before.

    For patch(model, config) that is the plain model, its adapter gone (save it first) and requires_grad as it was; for
    patch(peft_model) it is the PeftModel with PEFT's own layers, trained values kept.

    Raises:
        ValueError: the model was not patched.
    """
    fused = [module for module in model.modules() if isinstance(module, FusedLoraLinear)]
    for module in fused:
        module.__class__ = lora.Linear
    tuner = model.base_model if isinstance(model, PeftModel) else None
    trainable = getattr(tuner, _TRAINABLE_BEFORE, None)
    if trainable is not None:
        plain = tuner.unload()
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(name in trainable)
        return plain
    if not fused:
        raise ValueError("nothing to unpatch: the model was not made by gci_kernels.patch; PEFT's unload() removes adapters")
    return model


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer: `plan` says which implementation runs each stage, or `declined` why PEFT's own code does."""

    name: str
    method: str
    shape: str
    dtype: str
    base: str
    plan: str | None
    declined: str | None


class Report(list[LayerReport]):
    """The adapted layers of a model; printing it gives a table, equal layers in one row."""

    def __str__(self) -> str:
        table = Table("layers", "method", "shape", "dtype", "base product", "plan, or why declined", expand=False)
        groups: dict[tuple, list[str]] = {}
        for layer in self:
            pattern = re.sub(r"\.\d+(?=\.|$)", ".*", layer.name)
            row = (pattern, layer.method, layer.shape, layer.dtype, layer.base, layer.plan or f"declined: {layer.declined}")
            groups.setdefault(row, []).append(layer.name)
        for row, names in groups.items():
            table.add_row(f"{row[0]} x {len(names)}", *row[1:])
        console = Console(width=200)
        with console.capture() as capture:
            console.print(table)
        return capture.get().rstrip()


def report(model: nn.Module) -> Report:
    """What runs where: one :class:`LayerReport` for each adapted layer of `model`, as it is now.

    The plan is the one for x in the base weight's dtype; under autocast x has another.
    """
    return Report(
        _layer_report(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    )


def _layer_report(name: str, module: BaseTunerLayer) -> LayerReport:
    base = module.base_layer
    dtype, declined = fusion.matmul_dtype(base), _decline(module)
    if declined is None and is_plain_lora(module):
        declined = "not patched: call gci_kernels.patch(model)"
    obstacle = fusion.obstacle(base)
    if isinstance(module, LoRAMoELinear):
        method = "LoRAMoE " + ", ".join(f"{module.num_experts[a]}x{module.r[a]}" for a in module.loramoe_A)
    elif isinstance(module, lora.LoraLayer):
        method = "LoRA " + ", ".join(f"r={rank}" for rank in module.r.values())
    else:
        method = type(module).__name__
    plan = None
    if declined is None:
        device = next(module.parameters()).device.type
        plan = str(choose_plan("auto", device_type=device, dtype=dtype or next(module.parameters()).dtype))
        if module.disable_adapters or module.merged:
            plan += " (now: base layer alone, adapters disabled or merged)"
    return LayerReport(
        name=name,
        method=method,
        shape=f"{module.in_features} -> {module.out_features}",
        dtype=str(dtype).removeprefix("torch."),
        base="fused" if obstacle is None and declined is None else f"own call: {obstacle or 'declined'}",
        plan=plan,
        declined=declined,
    )
