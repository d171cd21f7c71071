"""Which modules an adapter's config means, before PEFT makes layers of them."""

import copy
from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn


def is_all_linear(target_modules: object) -> bool:
    """Whether it is PEFT's word for all linear layers."""
    return isinstance(target_modules, str) and target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def matched(model: nn.Module, config: PeftConfig) -> dict[str, nn.Module]:
    """Name -> plain module of all that `config` targets; of adapted modules the one within."""
    own: Any = copy.copy(config)
    if getattr(own, "target_modules", None) is None:
        kind = getattr(getattr(model, "config", None), "model_type", "")
        own.target_modules = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if own.target_modules is None:  # PEFT will say so, or it has target_parameters alone
        return {}
    own = _maybe_include_all_linear_layers(own, model)
    adapted = tuple(name + "." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return {
        name: module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for name, module in model.named_modules()
        if name and not name.startswith(adapted) and check_target_module_exists(own, name)
    }
