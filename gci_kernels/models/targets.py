"""Which modules an adapter's config targets, before PEFT replaces them by layers."""

import copy
from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn


def is_all_linear(target_modules: object) -> bool:
    """Whether target_modules is PEFT's shorthand for all linear layers, "all-linear"."""
    return isinstance(target_modules, str) and target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def matched(model: nn.Module, config: PeftConfig) -> dict[str, nn.Module]:
    """Name -> plain module of all that `config` targets; of an adapted layer, its base layer.

    Without target_modules in the config, PEFT's defaults for the model's type are taken.
    """
    complete: Any = copy.copy(config)
    if getattr(complete, "target_modules", None) is None:
        model_type = getattr(getattr(model, "config", None), "model_type", "")
        complete.target_modules = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if complete.target_modules is None:  # PEFT will raise, or the config has target_parameters alone
        return {}
    complete = _maybe_include_all_linear_layers(complete, model)
    modules = plain_modules(model)
    return {name: module for name, module in modules.items() if name and check_target_module_exists(complete, name)}


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of all modules in `model`, without its adapters: of an adapted layer, its base layer."""
    adapted = tuple(name + "." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return {
        name: module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for name, module in model.named_modules()
        if not name.startswith(adapted)
    }
