"""The package's methods among PEFT's: the record of one, their registry, and what PEFT and adapter files call them."""

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor

from gci_kernels.ops import Mixer


class MethodType(str, enum.Enum):
    """`peft_type` of a config of the package: PEFT and transformers use it as they use their own peft.PeftType.

    As there, a member equals its name as a string, has the same hash, and is that string in JSON. Every method has a
    class of its own, for members cannot be added: :func:`method_type` makes it.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return method_type, (self.value.removeprefix("GCI_"),)


@functools.cache
def method_type(name: str) -> MethodType:
    """The `peft_type` of the method called `name`, in any case: GCI_ and the name in capitals."""
    value = f"GCI_{name.upper()}"
    return next(iter(MethodType(f"{value}_Type", {value: value})))  # type: ignore[call-overload]  # the functional form


def type_in_file(config: Any) -> str:
    """What adapter_config.json has as `peft_type` of an adapter of this config class.

    Where the method is not registered PEFT raises a KeyError with these words and no others: they say what to do.
    """
    kind = method_type(config.method).value
    own = config.__module__.startswith("gci_kernels.")
    return f"gci_kernels.{kind}" if own else f"{kind}: import the module that registers it with gci_kernels first"


@dataclass(frozen=True, eq=False)
class Method:
    """A PEFT method whose layers are bottleneck adapters: all that it does not share with the others.

    Attributes:
        config: its config, a dataclass derived from BottleneckConfig with `method`, the method's name.
        mixer: what stands between A and B; a registered gci_kernels.ops.Mixer.
        parameters: (config, in_features, out_features) -> the new adapter's tensors: "A" [rank, in], "B" [out, columns]
            and, where the mixer has weights, one more matrix, under a name of its own.
        describe: of a config, the adapter's size, short: for reports.
        example: a small config with an effect: what the tests, `gci-kernels verify` and the benchmark adapt with.
        settings: of a config, the mixer's numbers.
        saved: fields of the config that the layer computes with and that no tensor's shape shows; they are saved among
            the weights, so that loading detects a config that belongs to other weights.
        default_targets: the names of the modules that are adapted where the config names none.
        B: B's name among the parameters. With "lora_B" in it, PEFT's LoRA+ gives it the higher learning rate.
        prefix: what the parameters' names begin with; None: gci_ and the name.
        depends_on: what the update depends on, where the mixer cannot be merged: for the message that says so.
    """

    config: type[Any]
    mixer: Mixer
    parameters: Callable[[Any, int, int], dict[str, Tensor]]
    describe: Callable[[Any], str]
    example: Any
    settings: Callable[[Any], tuple[int, ...]] = lambda config: ()
    saved: tuple[str, ...] = ("r", "lora_alpha")
    default_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    B: str = "lora_B"
    prefix: str | None = None
    depends_on: str = "the tokens"

    @property
    def name(self) -> str:
        """As it stands in messages and reports."""
        return self.config.method


def new_tensors(method: Method, config: Any, in_features: int, out_features: int) -> dict[str, Tensor]:
    """A new adapter's tensors by name: A [rank, in], B [out, columns], then the mixer's weights, if it has any.

    Each has memory of its own, whatever `parameters` shares among the layers.

    Raises:
        TypeError, ValueError: `parameters` returns something else.
    """
    says = f"method {method.name!r}: `parameters` must return"
    made = method.parameters(config, in_features, out_features)
    if not isinstance(made, dict) or not all(isinstance(t, Tensor) and t.is_floating_point() for t in made.values()):
        raise TypeError(f"{says} a dictionary of floating-point tensors by name, got {made!r}")
    others = [part for part in made if part not in ("A", "B")]
    if not {"A", "B"} <= made.keys() or len(others) > 1:
        raise ValueError(f"{says} A, B and at most one tensor more, got {sorted(made)}")
    if method.mixer.joins and not others:
        raise ValueError(f"{says} the weights that the mixer {method.mixer.name!r} joins with A, got A and B alone")
    width = in_features if method.mixer.joins else None
    rows = [_rows(f"{says} {part}", made[part], width) for part in others]
    columns = method.mixer.columns(_rows(f"{says} A", made["A"], in_features), *(rows or [0]))
    if tuple(made["B"].shape) != (out_features, columns):
        raise ValueError(f"{says} B [{out_features}, {columns}], got {list(made['B'].shape)}")
    return {part: made[part].detach().clone(memory_format=torch.contiguous_format) for part in ("A", "B", *others)}


def _rows(says: str, tensor: Tensor, width: int | None) -> int:
    """The rows of a matrix; ValueError unless it is one, of `width` columns."""
    if tensor.dim() != 2 or not tensor.shape[0] or width not in (None, tensor.shape[1]):
        raise ValueError(f"{says} [at least 1, {'any' if width is None else width}], got {list(tensor.shape)}")
    return tensor.shape[0]


def settings_of(method: Method, config: Any) -> tuple[int, ...]:
    """The mixer's numbers of an adapter; TypeError where they are no integers."""
    numbers = method.settings(config)
    if not isinstance(numbers, tuple) or any(type(n) is not int for n in numbers):
        raise TypeError(f"method {method.name!r}: `settings` must return a tuple of integers, got {numbers!r}")
    return numbers


METHODS: dict[str, Method] = {}
"""The registered methods by name: LoRAMoE, ALoRA, and those of other modules."""


def is_known_to_peft(name: str) -> bool:
    """Whether a method of this name, in any case, is registered."""
    return method_type(name) in PEFT_TYPE_TO_CONFIG_MAPPING


def register_with_peft(config: Any, tuner: Any) -> None:
    """Makes a method known to PEFT: by its type, and by both names that a saved config may have.

    Adapters that an earlier version saved have the type's own name.
    """
    kind: Any = method_type(config.method)
    names: Any = type_in_file(config)
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config
    PEFT_TYPE_TO_CONFIG_MAPPING[names] = config
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = tuner.prefix


def forget_with_peft(config: Any) -> None:
    """Takes back what :func:`register_with_peft` did."""
    for kind in (method_type(config.method), type_in_file(config)):
        for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            cast(dict, mapping).pop(kind, None)
