"""The present state of a model, for what was computed with it: may it be used again, or has the model changed since?"""

import hashlib
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def base_model(model: Any) -> Any:
    """The transformers model inside a PeftModel, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapter_states(model: nn.Module) -> list[list]:
    """Which adapters are active and with which scaling: a list for each adapted module, of JSON types."""
    found: list[list] = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            scaling = sorted((key, float(value)) for key, value in getattr(layer, "scaling", {}).items())
            disabled, merged = bool(layer.disable_adapters), list(layer.merged_adapters)
            found.append([name, list(layer.active_adapters), disabled, merged, [list(pair) for pair in scaling]])
    return found


def parameter_versions(model: nn.Module) -> list[tuple]:
    """Each parameter's identity and version: changes when one is written in place, replaced or moved.

    Writes through `.data` are not counted.
    """
    return [
        (name, id(parameter), 0 if parameter.is_inference() else parameter._version, parameter.dtype, parameter.device)
        for name, parameter in model.named_parameters()
    ]


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights: of 256 values of every tensor, its name, dtype and shape."""
    known = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        count = min(flat.numel(), 256)  # evenly spread, in integers: float32 can't count the values of an embedding
        some = flat[torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)]
        known.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        known.update(some.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return known.hexdigest()
