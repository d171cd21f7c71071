"""What the package's own PEFT methods share: the common part of their configs, layers and tuners."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn

from gci_kernels.ops.bottleneck import choose_plan
from gci_kernels.ops.decode import DecodePlan
from gci_kernels.tuners import fusion, hooks, mixed
from gci_kernels.tuners.decoding import DecodingLayer
from gci_kernels.tuners.hooks import HOOK
from gci_kernels.tuners.scaling import number


def check_integer(name: str, value: int, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be at least {low}{'' if high is None else f' and at most {high}'}, got {value}")


def check_number(name: str, value: float, allowed: str, low: float = -math.inf, high: float = math.inf) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} must be {allowed}, got {value}")


@dataclass
class BottleneckConfig(PeftConfig):
    """The fields that every bottleneck method has; the subclasses say what they mean."""

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_weights: bool = True

    method: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method
        check_integer("r", self.r, 1)
        check_number("lora_alpha", self.lora_alpha, "a finite number")
        check_number("lora_dropout", self.lora_dropout, "in [0, 1)", 0, math.nextafter(1, 0))
        self._check_patterns()
        if (
            isinstance(self.target_modules, str)
            and self.target_modules != "all-linear"
            and (self.layers_to_transform is not None or self.layers_pattern is not None)
        ):
            raise ValueError("layers_to_transform and layers_pattern need target_modules as a list of names")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(f"{name} must be a dict from module names to numbers, got {getattr(self, name)!r}")
        for pattern, rank in self.rank_pattern.items():
            check_integer(f"rank_pattern[{pattern!r}]", rank, 1)
        for pattern, alpha in self.alpha_pattern.items():
            check_number(f"alpha_pattern[{pattern!r}]", alpha, "a finite number")

    def of_module(self, key: str) -> "BottleneckConfig":
        """A copy with the r and lora_alpha that the patterns give to the module `key`."""
        own = copy.copy(self)
        own.r = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), key), self.r)
        own.lora_alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), key), self.lora_alpha)
        return own


class AdaptedLinear(nn.Module, BaseTunerLayer):
    """A linear layer with adapters of one method.

    Subclasses name their parameters, make them in `update_layer`, keep each adapter's rank in `r`, and compute in
    `_adapted`.
    """

    method_name: str
    base_layer: nn.Module
    in_features: int
    out_features: int
    r: dict[str, int]
    scaling: dict[str, Any]  # numbers, or tensors of one
    update_layer: Callable[..., None]

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        for parameters in self.adapter_layer_names:
            setattr(self, parameters, nn.ParameterDict())
        for settings in self.other_param_names:
            setattr(self, settings, {})
        self._disable_adapters = False
        self._active_adapter = name
        self.merged_adapters: list[str] = []
        sizes: Any = _get_in_out_features(self.get_base_layer())
        self.in_features, self.out_features = sizes

    def adapters(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.r]

    def forward(self, x: Tensor, *args, adapter_names: list[str] | None = None, **kwargs) -> Tensor:
        """x [..., in] -> [..., out] in the base layer's dtype; `adapter_names`: one for each row of x, in inference."""
        if args or kwargs:
            raise TypeError(
                f"{self.method_name} layers take x alone, got {len(args)} more arguments and {sorted(kwargs)}"
            )
        mix = mixed.current(self) if adapter_names is None else mixed.Mix(adapter_names)
        if self._disable_adapters or self.merged_adapters:
            return self._base_alone(x, mix)
        if mix is not None:
            return self._mixed(x, mix)
        return self._adapted(x, self.adapters())

    def _base_alone(self, x: Tensor, mix: mixed.Mix | None) -> Tensor:
        """The base layer's output, while the adapters are merged into it or disabled."""
        if self.merged and mix is not None:
            raise ValueError("adapter_names: an adapter is merged into the base layer; call unmerge_adapter() first")
        if self.disable_adapters and self.merged:
            self.unmerge()  # as PEFT's layers: what is disabled does not show
        return self.base_layer(x)

    def _adapted(self, x: Tensor, names: list[str]) -> Tensor:
        raise NotImplementedError

    def _mixed(self, x: Tensor, mix: mixed.Mix) -> Tensor:
        """Every row of x with the adapter of its own."""
        raise NotImplementedError

    def describe(self, name: str) -> str:
        """The adapter's shape, short: for reports."""
        raise NotImplementedError

    def plan(self, tokens: int, dtype: torch.dtype, device_type: str) -> str:
        """What "auto" takes for x [tokens, in]: for reports."""
        raise NotImplementedError

    def parameter(self, part: str, name: str) -> Any:
        """The adapter's parameter as a call of its container would find it, without what looking it up there costs."""
        container: Any = self._modules[part]
        try:
            found = container._parameters[name]
        except KeyError:  # a replica of torch.nn.DataParallel, whose parameters are plain attributes
            return getattr(container, name)
        if HOOK in container.__dict__ and found.is_meta:
            return hooks.brought(container, name, found)
        return found

    def decode_plan(self, dtype: torch.dtype, device_type: str) -> DecodePlan | None:
        """What a decoding step of one token launches for the first active adapter, None: the plan's stages."""
        return None

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {self.describe(name)}" for name in self.r)


class BottleneckLayer(DecodingLayer, AdaptedLinear):
    """A linear layer with adapters that add to its output; several active ones add up. They cannot be merged."""

    mixer: str  # of ops/bottleneck/mixers
    no_merge: str
    dropout_p: dict[str, float]

    def _adapted(self, x: Tensor, names: list[str]) -> Tensor:
        return self._run(x, names)

    def _mixed(self, x: Tensor, mix: mixed.Mix) -> Tensor:
        mix.check(x, self)
        return self._run_mixed(x, mix.names, self.r)

    def _has_step(self, name: str) -> bool:
        return not (self.training and self.dropout_p[name]) and number(self.scaling[name]) is not None

    def plan(self, tokens: int, dtype: torch.dtype, device_type: str) -> str:
        return str(choose_plan("auto", tokens=tokens, dtype=dtype, device_type=device_type, mixer=self.mixer))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(self.no_merge)

    def unmerge(self) -> None:
        raise ValueError(self.no_merge)


@contextlib.contextmanager
def _whole(base: nn.Module) -> Iterator[None]:
    """Meanwhile the base layer's weight is all there, on the device where the layer computes, for the adapter too."""
    with gather_params_ctx(list(base.parameters(recurse=False)), modifier_rank=None), hooks.at_hand(base):
        yield


class AdaptedModel(BaseTuner):
    """PEFT's tuner for layers of :class:`AdaptedLinear`."""

    tuner_layer_cls: type[Any]

    def _new_layer(self, target: nn.Module, name: str, config: Any, key: str) -> AdaptedLinear:
        raise NotImplementedError

    def _update_layer(self, layer: Any, name: str, config: Any, key: str) -> None:
        layer.update_layer(name, config)

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(target, self.tuner_layer_cls):
            with _whole(base):
                self._update_layer(target, adapter_name, peft_config, current_key)
            return
        if not fusion.is_linear(base):
            raise TypeError(
                f"target_modules: {current_key} is a {type(base).__name__}; {self.tuner_layer_cls.method_name} adapts "
                "torch.nn.Linear, layers derived from it, transformers' Conv1D, and quantised layers that PEFT knows"
            )
        with _whole(base):
            layer = self._new_layer(target, adapter_name, peft_config, current_key).train(target.training)
            self._replace_module(parent, target_name, layer, target)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """PEFT's way into mixed batches, around a forward or generate() whose arguments it gets."""
        if kwargs.get("adapter_names") is None:
            yield
            return
        known = {name for layer in self.modules() if isinstance(layer, AdaptedLinear) for name in layer.r}
        names = mixed.checked_names(self, kwargs["adapter_names"], known)
        with mixed.given(self, names, args, kwargs, (AdaptedLinear,), (AuxiliaryTrainingWrapper,)):
            yield


class BottleneckModel(AdaptedModel):
    """PEFT's tuner for layers of :class:`BottleneckLayer`."""

    default_targets: tuple[str, ...]

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        own = peft_config.of_module(current_key)
        super()._create_and_replace(own, adapter_name, target, target_name, parent, current_key, parameter_name)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> BottleneckConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = set(self.default_targets)
        return peft_config

    def _detach(self) -> None:
        """Takes back what the tuner did to the model beside its layers."""

    def _unload_and_optionally_merge(self, merge: bool = True, *args, **kwargs) -> Any:
        if merge:
            raise ValueError(self.tuner_layer_cls.no_merge)
        model = super()._unload_and_optionally_merge(False, *args, **kwargs)
        self._detach()
        return model


def register(config: Any, tuner: type[AdaptedModel]) -> None:
    """Makes the method known to PEFT under its plain string key."""
    PEFT_TYPE_TO_CONFIG_MAPPING[config.method] = config
    PEFT_TYPE_TO_TUNER_MAPPING[config.method] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[config.method] = tuner.prefix
