"""patch and unpatch: with report, the whole public surface for models."""

import copy
import re
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn

from gci_kernels.class_swap import add_mixin, remove_mixin
from gci_kernels.impl import check_impl
from gci_kernels.models import experts, parents
from gci_kernels.models.targets import matched
from gci_kernels.patching.peft_layers import obstacle
from gci_kernels.patching.report import LayerReport, Report, report
from gci_kernels.patching.undo import Snapshot, Undo, make_undoable, unmerge
from gci_kernels.tuners import frozen, published_loki, sharding
from gci_kernels.tuners.base import AdaptedConfig, check_modules_to_save
from gci_kernels.tuners.lora import FusedLora, FusedLoraModel, is_plain_lora, place, swap_tuners
from gci_kernels.tuners.merging import inside_attention

__all__ = ["LayerReport", "Report", "patch", "report", "unpatch"]


def patch(
    model: nn.Module, config: PeftConfig | None = None, *, adapter_name: str = "default", upcast_frozen: bool = False,
    impl: str = "auto",
) -> nn.Module:  # fmt: skip
    """Fuses a model's adapters, in place; with a config, adds the adapter first. An error leaves the model as it was.

    Args:
        model: with a config, a plain model, most often from transformers; without, one that has PEFT's LoRA layers or
            the published LoKI repository's layers.
        config: of one of the package's methods (gci_kernels.tuners), or peft.LoraConfig. The caller's object is not
            changed.
        adapter_name: the new adapter's name in PEFT.
        upcast_frozen: let the model's frozen torch.nn.Linear layers, the head among them, take float32 products too
            where they are faster: in bfloat16 and float16, on a CPU without instructions for them. They are then more
            exact than PyTorch's and their bits differ. Off, these layers stay PyTorch's, however slow.
        impl: what all adapted layers pass to their op as `impl`: "auto", "reference" (plain PyTorch), "aten", "upcast",
            "native" (C++) or "triton". One of the last four that cannot run raises in forward.

    Returns:
        With a config a PeftModel around `model`; without one `model` itself. A layer whose adapter cannot be fused
        keeps PEFT's own computation; :func:`report` gives the reason. Patching twice changes nothing.

    Raises:
        ValueError, TypeError: the model has nothing to patch, or an argument does not fit. The model is then as it was.
    """
    check_impl(impl)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    snapshot = Snapshot(model, config)
    try:
        peft_model = model if config is None else _add_adapter(model, config, adapter_name)
        if config is None:
            published = [module for module in model.modules() if published_loki.is_published_layer(module)]
            for module in published:
                published_loki.swap(module)
            _fuse_lora(model, needed=not published)
        parents.disable_fast_paths(peft_model)
        if upcast_frozen:
            frozen.swap_all(peft_model)
        _set_impl(peft_model, impl)
        if config is not None:
            make_undoable(peft_model.base_model, Undo(snapshot))
    except BaseException:
        Undo(snapshot).apply()
        raise
    return peft_model


def _add_adapter(model: nn.Module, config: PeftConfig, adapter_name: str) -> PeftModel:
    if not isinstance(config, (AdaptedConfig, LoraConfig)):
        own = {c.__name__: c for c in PEFT_TYPE_TO_CONFIG_MAPPING.values() if issubclass(c, AdaptedConfig)}
        raise TypeError(f"config must be a {', '.join(own)} or peft.LoraConfig, got {type(config).__name__}")
    if config.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise ValueError(
            f"{type(config).__name__}: its method is not registered; call gci_kernels.register for it first"
        )
    if isinstance(model, PeftModel):
        raise ValueError("model is a PeftModel already: use its add_adapter, then patch(model) without a config")
    _check_targets(model, config)
    config = copy.deepcopy(config)
    if not isinstance(config, LoraConfig):
        return get_peft_model(model, config, adapter_name=adapter_name)
    targets = matched(model, config)
    for name, module in targets.items():
        if sharding.is_tensor_parallel(module):
            raise ValueError(sharding.refusal("a fused LoRA", name))
    parents.warn(model, config, targets)
    peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    place(peft_model, config, adapter_name)
    _fuse_lora(peft_model)
    experts.warn(model, config, "LoRA")
    return peft_model


def _check_targets(model: nn.Module, config: AdaptedConfig | LoraConfig) -> None:
    """ValueError where a name or pattern matches no module: PEFT ignores a misspelt one as long as another matches."""
    names = [name for name, _ in model.named_modules()]
    check_modules_to_save(config, names)
    adaptable = [*names, *(name for name, _ in model.named_parameters())]  # PEFT adds ranks of target_parameters
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field, None) or ():
            if not any(get_pattern_key([pattern], name) is pattern for name in adaptable):
                raise ValueError(f"{field}: no module matches {pattern!r}")
    if not isinstance(config.target_modules, (list, set, tuple)):
        return
    unknown = [t for t in config.target_modules if not any(name == t or name.endswith("." + t) for name in names)]
    if unknown:
        leaves = {re.sub(r".*\.", "", name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        raise ValueError(
            f"target_modules: no module is named {sorted(unknown)}; linear layers here: {sorted(leaves)}"
            f"{experts.hint(model)}"
        )


def _fuse_lora(model: nn.Module, needed: bool = True) -> None:
    merged_by_peft = inside_attention(model)
    adapted: list[tuple[str, Any]] = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and id(module) not in merged_by_peft
    ]
    obstacles = {name: obstacle(module) for name, module in adapted}
    if needed and all(obstacles.values()):
        found = "; ".join(f"{name}: {reason}" for name, reason in obstacles.items()) or "no adapter layers at all"
        raise ValueError(
            "nothing to patch: looked for linear layers of peft.tuners.lora with an adapter that is plain LoRA and for "
            f"layers of the published LoKI repository, found {found}. Pass a config to add an adapter"
        )
    for _, module in adapted:
        if is_plain_lora(module) and not sharding.is_tensor_parallel(module.get_base_layer()):
            add_mixin(module, FusedLora)
    swap_tuners(model)


def _set_impl(model: nn.Module, impl: str) -> bool:
    """Sets `impl` on everything in the model that has one; returns whether one had another than "auto" before."""
    changed = False
    for module in model.modules():
        if hasattr(type(module), "gci_impl"):
            changed |= vars(module).pop("gci_impl", None) is not None
            if impl != "auto":
                vars(module)["gci_impl"] = impl
    return changed


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes :func:`patch`, and returns what was there before.

    For patch(model, config) that is the plain model, bit for bit, without its adapters (save them first), those that
    were added later included; requires_grad, training mode and the config's fields that an adapter changes are as they
    were. Whatever others have added since, such as hooks, stays. For patch(peft_model) it is the PeftModel with PEFT's
    own layers and their trained values; the same for the published LoKI layers.

    Raises:
        ValueError: the model was not patched, or cannot be restored for a reason that the message names; nothing has
            been changed then.
    """
    tuner: Any = model.base_model if isinstance(model, PeftModel) else None
    undo: Undo | None = getattr(tuner, "_gci_undo", None)
    if undo is not None:
        plain = tuner.model
        if (reason := undo.obstacle(plain)) is not None:
            raise ValueError(f"unpatch cannot give the plain model back: {reason}")
        unmerge(plain)
        undo.apply()
        _remove_mixins(plain)
        return plain
    inner = next((name for name, module in model.named_modules() if "_gci_undo" in vars(module)), None)
    if inner is not None:
        raise ValueError(f"unpatch takes the PeftModel that patch returned; this is a {type(model).__name__} around it")
    had_impl, fused = _set_impl(model, "auto"), _remove_mixins(model)
    if not had_impl and not fused:
        raise ValueError(
            "nothing to unpatch: gci_kernels.patch did not make this model; unload() of a PeftModel, or "
            "delete_adapter() of a model from transformers, removes adapters"
        )
    parents.restore_fast_paths(model)
    return model


def _remove_mixins(model: nn.Module) -> bool:
    """Gives every layer and tuner that :func:`patch` gave another class its own back; whether there was any."""
    mixins = (FusedLora, FusedLoraModel, published_loki.FusedPublishedLayer, frozen.UpcastLinear)
    found = [module for module in model.modules() if isinstance(module, mixins)]
    for module in found:
        remove_mixin(module)
    return bool(found)
