"""Modules that read the weight of a layer within them and never call the layer: an adapter there has no effect."""

import warnings
from collections.abc import Iterable
from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from gci_kernels.models.weight_reads import weights_read

_SWITCH = "_gci_fast_path"  # the attribute that keeps what disable_fast_paths has changed


def readers(model: nn.Module) -> dict[str, str]:
    """Linear layers whose weight is read without calling them: name -> name and class of the module that reads it."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, str] = {}
    wrapped = {id(module.base_layer) for module in model.modules() if isinstance(module, BaseTunerLayer)}
    for name, module in model.named_modules():
        if isinstance(module, (BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper)) or id(module) in wrapped:
            continue
        of_torch = isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
        for layer in [module.out_proj] if of_torch else weights_read(module):
            base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
            linear = hasattr(base, "in_features") or hasattr(base, "nf")
            if linear and hasattr(base, "weight") and id(layer) in names:
                found.setdefault(names[id(layer)], f"{name or 'the model'} ({type(module).__name__})")
    return found


def reason(reader: str) -> str:
    """Why an adapter has no effect on a layer; `reader`: a value of :func:`readers`."""
    return f"{reader} can compute with its weight without calling it, and an adapter has no effect then"


def leave_out(model: nn.Module, config: Any, method: str, names: Iterable[str]) -> None:
    """Excludes :func:`readers` from the targets, with one warning, for a config that does not name them itself.

    Args:
        model: without the adapter.
        config: the adapter's; its exclude_modules are extended.
        method: the adapter's, for the warning.
        names: of the layers that the config targets.
    """
    found = _read_among(model, names)
    if not found:
        return
    excluded = config.exclude_modules
    if isinstance(excluded, str):  # a regular expression
        config.exclude_modules = "|".join([f"(?:{excluded})", *(name.replace(".", r"\.") for name in found)])
    else:
        config.exclude_modules = {*(excluded or ()), *found}
    warnings.warn(f"{method} leaves {_first(found)} out: {reason(next(iter(found.values())))}", stacklevel=2)


def refuse(model: nn.Module, method: str, names: Iterable[str], way_out: str) -> None:
    """Refuses :func:`readers` among the layers that a config asks for by name.

    Args:
        model: without the adapter.
        method: the adapter's, for the message.
        names: of the layers.
        way_out: the end of the message, what to do.

    Raises:
        ValueError: one of the layers is not called where its weight is used.
    """
    for name, reader in _read_among(model, names).items():
        raise ValueError(f"{method} cannot adapt {name}: {reason(reader)}; {way_out}")


def warn(model: nn.Module, config: PeftConfig, names: Iterable[str]) -> None:
    """One warning where a method of PEFT's own, which adapts :func:`readers` as well, has any among `names`."""
    if found := _read_among(model, names):
        kind = getattr(config.peft_type, "value", config.peft_type)
        warnings.warn(f"{kind} adapts {_first(found)}: {reason(next(iter(found.values())))}", stacklevel=2)


def _read_among(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    found = readers(model)
    return {name: found[name] for name in names if name in found}


def _first(names: dict[str, str]) -> str:
    first, *rest = names
    return first if not rest else f"{first} and {len(rest)} more"


def disable_fast_paths(model: nn.Module) -> None:
    """Makes torch's encoder layers that have adapters within call their layers.

    In evaluation their fused kernel, the "fast path", would read the layers' weights; in training it is never used.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _is_adapted(module):
            _turn_off(module, "activation_relu_or_gelu")
        # It would give its layers nested tensors, which only the kernel takes.
        if isinstance(module, nn.TransformerEncoder) and _is_adapted(module):
            _turn_off(module, "use_nested_tensor")


def _is_adapted(module: nn.Module) -> bool:
    return any(isinstance(each, BaseTunerLayer) for each in module.modules())


def _turn_off(module: nn.Module, switch: str) -> None:
    if _SWITCH not in vars(module):
        vars(module)[_SWITCH] = (switch, getattr(module, switch, False))
        setattr(module, switch, type(getattr(module, switch, False))(0))


def restore_fast_paths(model: nn.Module) -> None:
    """Undoes :func:`disable_fast_paths`."""
    for module in model.modules():
        if (changed := vars(module).pop(_SWITCH, None)) is not None:
            setattr(module, *changed)
