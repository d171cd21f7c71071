"""Tries a method's record when it is registered: what is wrong with it shows then, not in the middle of training."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gci_kernels.hardware import KERNELS
from gci_kernels.ops import Call, Mixer
from gci_kernels.ops.bottleneck.by_autograd import apply
from gci_kernels.ops.bottleneck.mixer import Output
from gci_kernels.tuners.bottleneck import BottleneckConfig
from gci_kernels.tuners.methods import Method, is_known_to_peft, method_type, new_tensors, settings_of

_IN, _OUT, _BATCH, _TIME = 8, 6, 2, 3  # of the layer and the input that a record is tried with
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")  # it becomes part of the names of classes and parameters
_LORA = "lora"  # PEFT's own method, which verify and the benchmark call so


def check_record(method: Method) -> None:
    """That the method has a config and an example, and a name that no other has; ValueError or TypeError says which."""
    if not isinstance(method, Method):
        raise TypeError(f"register takes a gci_kernels.Method, got {method!r}")
    config = method.config
    derived = isinstance(config, type) and issubclass(config, BottleneckConfig)
    if not derived or not isinstance(vars(config).get("method"), str) or "__dataclass_params__" not in vars(config):
        raise TypeError(
            f"config must be a dataclass derived from BottleneckConfig with `method`, the method's name, got {config!r}"
        )
    name = method.name
    if not _NAME.fullmatch(name):
        raise ValueError(f"method {name!r}: the name must consist of letters, digits and _, and begin with a letter")
    if name.lower() == _LORA or is_known_to_peft(name):
        raise ValueError(
            f"a method {name!r} is registered already, in small or capital letters; give this one another name, or "
            "unregister that one first"
        )
    example = method.example
    if not isinstance(example, config):
        raise TypeError(
            f"method {name!r} needs an example, a small {config.__name__} with an effect (init_weights=False), "
            f"which tests, verify and the benchmark adapt with; got {example!r}"
        )
    if example.peft_type != method_type(name):
        raise TypeError(f"method {name!r}: __post_init__ of {config.__name__} must call super().__post_init__()")


def check(method: Method, alone: bool) -> list[str]:
    """Tries the functions of a method, whose mixer is registered, on a small layer.

    Args:
        method: the record.
        alone: whether the formula has to give the same for a token, whatever the others are.

    Returns:
        The names of an adapter's tensors, in the order in which layers keep them.

    Raises:
        ValueError, TypeError: naming the method, and what is wrong with which function.
    """
    _check_fields(method)
    with torch.random.fork_rng(devices=[]):
        _guarded(method, "its mixer's `columns`", method.mixer.columns)(1, 1)
        _guarded(method, "`parameters`", method.parameters)(method.example, _IN, _OUT)
        tensors = new_tensors(method, method.example, _IN, _OUT)
        _check_formula(method, [t.double() for t in tensors.values()], alone)
    return list(tensors)


def _check_fields(method: Method) -> None:
    says, example, mixer = f"method {method.name!r}:", method.example, method.mixer
    about = _guarded(method, "`describe`", method.describe)(example)
    if not isinstance(about, str):
        raise TypeError(f"{says} `describe` must return a string, got {about!r}")
    for field in method.saved:
        if not isinstance(getattr(example, field, "nothing"), (int, float, type(None))):
            raise ValueError(f"{says} `saved` names {field!r}, which is no field of its config that holds a number")
    targets = method.default_targets
    if not isinstance(targets, tuple) or not targets or not all(isinstance(each, str) for each in targets):
        raise TypeError(f"{says} default_targets must be a tuple of names, got {targets!r}")
    if not isinstance(mixer.output, Output):
        raise TypeError(f"{says} its mixer's output must be an Output, as Output.CONSTANT, got {mixer.output!r}")
    if unknown := mixer.implementations - {"native", "triton"}:
        raise ValueError(f"{says} its mixer has implementations {sorted(unknown)}; there are 'native' and 'triton'")
    if mixer.kernel is not None and mixer.kernel not in KERNELS:
        raise ValueError(f"{says} its mixer names the kernel {mixer.kernel!r}; there are {', '.join(sorted(KERNELS))}")


def _check_formula(method: Method, tensors: list[Tensor], alone: bool) -> None:
    says, mixer = f"method {method.name!r}: its mixer's formula", method.mixer
    numbers = settings_of(method, method.example)
    A, B, *others = tensors
    weights = others[0] if others else None
    x = torch.randn(_BATCH, _TIME, _IN, dtype=torch.float64)
    h = F.linear(x, A.requires_grad_())
    seen = None if weights is None else weights.requires_grad_()
    if mixer.joins and seen is not None:
        seen = F.linear(x, seen)
    inputs = [h] if seen is None else [h, seen]
    run = _runner(method, numbers, 0 if weights is None else weights.shape[0])

    versions = [t._version for t in inputs]
    u, output = run(h, seen)
    if versions != [t._version for t in inputs]:
        raise ValueError(f"{says} changes its arguments in place, which others still need; let it make new tensors")
    if u.dtype != h.dtype or u.device != h.device:
        raise ValueError(f"{says} returned {u.dtype} on {u.device} for h of {h.dtype} on {h.device}")
    if not u.requires_grad or mixer.output is Output.DIFFERENTIABLE and not output.requires_grad:
        raise ValueError(f"{says} returned {'an output' if u.requires_grad else 'u'} through which no gradient flows")
    if not torch.equal(u, run(h, seen)[0]):
        raise ValueError(
            f"{says} gives different values each time, and backward computes it again: make it a function of its "
            "arguments (for dropout, use lora_dropout)"
        )
    one = seen[:, 1:2] if mixer.joins and seen is not None else seen
    if alone and not torch.allclose(run(h[:, 1:2], one)[0], u[:, 1:2]):
        raise ValueError(
            f"{says} mixes tokens: what it gives for a token depends on the others, which generation with a cache does "
            "not show it again"
        )
    update = F.linear(u, B)
    if not update.any():
        raise ValueError(f"{says} has no effect with the example: with init_weights=False B must not be zero")
    if mixer.merge is not None:
        merged = B @ _guarded(method, "its mixer's `merge`", mixer.merge)(A, weights, numbers)
        if not torch.allclose(F.linear(x, merged), update):
            raise ValueError(f"{says} and its `merge` do not agree: x @ (B @ merge(A)).T must be the update")


def _runner(method: Method, numbers: tuple[int, ...], rows: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """(h, weights) -> the formula's u and output, checked against what the mixer declares."""
    mixer: Mixer = dataclasses.replace(
        method.mixer, formula=_guarded(method, "its mixer's formula", method.mixer.formula)
    )

    def run(h: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        lead = tuple(h.shape[:-1])
        call = Call(numbers, 1.0, lead, h.shape[-1], h.dtype, h.dtype, "reference")
        return apply(mixer, h, weights, call, rows)

    return run


def _guarded(method: Method, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The method's function; what it raises is raised with the method's name."""

    def guarded(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            raise ValueError(f"method {method.name!r}: {what} raised {type(error).__name__}: {error}") from error

    return guarded
