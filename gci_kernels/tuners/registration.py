"""Registering a method: its record is tried, and layer, tuner and PEFT's entries are made of it."""

from typing import Any

from torch import nn

from gci_kernels.ops.bottleneck.registry import MIXERS, STAGES
from gci_kernels.ops.bottleneck.registry import register as register_mixer
from gci_kernels.tuners import registered, trial
from gci_kernels.tuners.bottleneck import BottleneckLayer, BottleneckModel
from gci_kernels.tuners.methods import METHODS, Method, forget_with_peft, register_with_peft


def register(
    method: Method, layer: type[BottleneckLayer] = BottleneckLayer, tuner: type[BottleneckModel] = BottleneckModel
) -> Method:
    """Makes a method known to gci_kernels and PEFT: its config then works in patch, get_peft_model and from_pretrained.

    The formula is tried with the example's tensors. torch's random numbers are as before.

    Args:
        layer, tuner: bases of the method's own classes, for one that does more than its record says.

    Returns:
        The method.

    Raises:
        ValueError, TypeError: naming what the record lacks, or what does not fit together; nothing is registered then.
    """
    trial.check_record(method)
    new = method.mixer.name not in MIXERS
    register_mixer(method.mixer)
    try:
        roles = tuple(trial.check(method, alone=layer is BottleneckLayer))
        _make(method, layer, tuner, roles)
    except Exception:
        if new:
            _forget_mixer(method.mixer.name)
        raise
    return method


def unregister(name: str) -> None:
    """Forgets a method that :func:`register` made known, and its mixer unless another method has it.

    For notebooks, where a cell that registers runs again. Models that have such adapters go on working, and are no
    longer saved, loaded or pickled.

    Args:
        name: the method's.

    Raises:
        ValueError: no such method is registered, or it is one of the package's own.
    """
    method = METHODS.get(name)
    if method is None or method.config.__module__.startswith("gci_kernels."):
        raise ValueError(f"{name!r} is none of the methods that were registered beside the package's own")
    del METHODS[name]
    forget_with_peft(method.config)
    for made in (f"{name}Linear", f"{name}Model"):
        delattr(registered, made)
    if all(each.mixer.name != method.mixer.name for each in METHODS.values()) and method.mixer.name != "identity":
        _forget_mixer(method.mixer.name)


def _forget_mixer(name: str) -> None:
    del MIXERS[name], STAGES[name]


def _make(method: Method, layer: type, tuner: type, roles: tuple[str, ...]) -> None:
    """The method's own layer and tuner, and its entries in the registries."""
    prefix = method.prefix or f"gci_{method.name.lower()}_"
    names = tuple(prefix + (method.B if role == "B" else role) for role in roles)
    settings = prefix + "settings"
    if len({*names, settings}) != len(names) + 1 or any(hasattr(layer, each) for each in names):
        raise ValueError(
            f"method {method.name!r}: the layer's parameters would be called {', '.join(names)} beside {settings}, "
            "which are not all different or are taken: choose other names in `parameters`, or another B or prefix"
        )
    own = {
        "method": method, "method_name": method.name, "roles": roles, "adapter_layer_names": names,
        "other_param_names": ("r", "scaling", "dropout_p", "settings", "configs", settings), "settings_name": settings,
        "__annotations__": dict.fromkeys(names, nn.ParameterDict),
    }  # fmt: skip
    made_layer = _subclass(f"{method.name}Linear", layer, own)
    own = {"method": method, "prefix": prefix, "tuner_layer_cls": made_layer}
    made_tuner = _subclass(f"{method.name}Model", tuner, own)
    METHODS[method.name] = method
    register_with_peft(method.config, made_tuner)


def _subclass(name: str, base: type, attributes: dict[str, Any]) -> Any:
    made = type(name, (base,), attributes | {"__module__": registered.__name__, "__doc__": base.__doc__})
    setattr(registered, name, made)
    return made


def classes_of(method: Method) -> tuple[Any, Any]:
    """The layer and the tuner that :func:`register` made of a method."""
    return getattr(registered, f"{method.name}Linear"), getattr(registered, f"{method.name}Model")
