"""Modules that compute with the weight of a layer within them and never call it: an adapter there has no effect."""

import warnings
from collections.abc import Iterable
from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from gci_kernels.models.weight_reads import weights_read

_FAST = "_gci_fast_path"


def readers(model: nn.Module) -> dict[str, str]:
    """Linear layers whose weight is used without calling them: name -> name and class of the module that uses it."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, str] = {}
    wrapped = {id(module.base_layer) for module in model.modules() if isinstance(module, BaseTunerLayer)}
    for name, module in model.named_modules():
        if isinstance(module, (BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper)) or id(module) in wrapped:
            continue
        for layer in _read_by(module):
            base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
            if _is_linear(base) and id(layer) in names:
                found.setdefault(names[id(layer)], f"{name or 'the model'} ({type(module).__name__})")
    return found


def _read_by(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
        return [module.out_proj]
    return weights_read(module)


def _is_linear(module: Any) -> bool:
    return hasattr(module, "weight") and not isinstance(module, nn.Embedding) and _features(module) is not None


def _features(module: Any) -> Any:
    return getattr(module, "in_features", getattr(module, "nf", None))


def sentence(reader: str) -> str:
    """Why an adapter on a layer has no effect."""
    return f"{reader} can compute with its weight without calling it, and an adapter has no effect then"


def leave_out(model: nn.Module, config: Any, method: str, names: Iterable[str]) -> None:
    """Excludes such layers from a config that has not named them, with one warning."""
    found = readers(model)
    out = {name: found[name] for name in names if name in found}
    if not out:
        return
    config.exclude_modules = _joined(config.exclude_modules, out)
    warnings.warn(f"{method} leaves {_first(out)} out: {sentence(next(iter(out.values())))}", stacklevel=2)


def _joined(excluded: set[str] | str | None, more: Iterable[str]) -> set[str] | str:
    if isinstance(excluded, str):  # a regular expression
        return "|".join([f"(?:{excluded})", *(name.replace(".", r"\.") for name in more)])
    return set(excluded or ()) | set(more)


def refuse(model: nn.Module, method: str, names: Iterable[str], way_out: str) -> None:
    """
    Raises:
        ValueError: one of the layers that are asked for by name is not called where its weight is used.
    """
    found = readers(model)
    if (name := next((name for name in names if name in found), None)) is not None:
        raise ValueError(f"{method} cannot adapt {name}: {sentence(found[name])}; {way_out}")


def warn(model: nn.Module, config: PeftConfig, names: Iterable[str]) -> None:
    """PEFT's own methods take such layers; then one warning."""
    found = readers(model)
    out = {name: found[name] for name in names if name in found}
    if out:
        kind = getattr(config.peft_type, "value", config.peft_type)
        warnings.warn(f"{kind} adapts {_first(out)}: {sentence(next(iter(out.values())))}", stacklevel=2)


def _first(names: dict[str, str]) -> str:
    first, *rest = names
    return first if not rest else f"{first} and {len(rest)} more"


def _has_fast_path(module: nn.Module) -> bool:
    """Whether it is torch's encoder layer, whose kernel for evaluation reads its layers' weights."""
    return isinstance(module, nn.TransformerEncoderLayer)


def call_layers(model: nn.Module) -> None:
    """Turns that kernel off in encoder layers that have adapters within; in training they never take it."""
    for module in model.modules():
        if _has_fast_path(module) and _is_adapted(module):
            _turn_off(module, "activation_relu_or_gelu")
        # Its layers would be given nested tensors, which only the kernel takes.
        if isinstance(module, nn.TransformerEncoder) and _is_adapted(module):
            _turn_off(module, "use_nested_tensor")


def _is_adapted(module: nn.Module) -> bool:
    return any(isinstance(each, BaseTunerLayer) for each in module.modules())


def _turn_off(module: nn.Module, switch: str) -> None:
    if _FAST not in vars(module):
        vars(module)[_FAST] = (switch, getattr(module, switch, False))
        setattr(module, switch, type(getattr(module, switch, False))(0))


def call_layers_no_more(model: nn.Module) -> None:
    """Undoes :func:`call_layers`."""
    for module in model.modules():
        if (kept := vars(module).pop(_FAST, None)) is not None:
            setattr(module, *kept)
