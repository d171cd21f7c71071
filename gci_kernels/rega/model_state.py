"""What a model is at the moment, so that answers and caches are not mixed with those of another state of it."""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def inner(model: Any) -> Any:
    """The model that generates: the one inside of a PeftModel."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapters(model: nn.Module) -> list[list]:
    """Which adapters take part in a forward and how strongly: a list for each adapted module, of plain JSON types."""
    found: list[list] = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            scaling = sorted((key, float(value)) for key, value in getattr(layer, "scaling", {}).items())
            disabled, merged = bool(layer.disable_adapters), list(layer.merged_adapters)
            found.append([name, list(layer.active_adapters), disabled, merged, [list(pair) for pair in scaling]])
    return found


def weights(model: nn.Module) -> list[tuple]:
    """Changes with every write to a parameter that PyTorch counts, and with every parameter put in another's place.

    What is written through `.data` is not counted.
    """
    return [
        (name, id(parameter), 0 if parameter.is_inference() else parameter._version, parameter.dtype, parameter.device)
        for name, parameter in model.named_parameters()
    ]
