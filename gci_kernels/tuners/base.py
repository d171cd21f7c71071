"""What all of the package's PEFT methods share, LoKI too: the common part of their configs, layers and tuners."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from gci_kernels.models import experts, parents
from gci_kernels.ops.decode import DecodePlan
from gci_kernels.tuners import adapter_file, fusion, hooks, mixed, sharding, shared_input
from gci_kernels.tuners.fused_layer import among
from gci_kernels.tuners.hooks import HOOK
from gci_kernels.tuners.merging import Mergeable
from gci_kernels.tuners.methods import method_type, type_in_file


def check_integer(name: str, value: int, low: int, high: int | None = None) -> None:
    """TypeError or ValueError, with the argument's name, unless value is an integer in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be at least {low}{'' if high is None else f' and at most {high}'}, got {value}")


def check_number(name: str, value: float, allowed: str, low: float = -math.inf, high: float = math.inf) -> None:
    """TypeError or ValueError, with the argument's name and what is `allowed`, unless value is in [low, high]."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} must be {allowed}, got {value}")


def uniform(*shape: int) -> Tensor:
    """A new float32 tensor [rows, columns], uniform as LoRA's A starts (Kaiming, a = sqrt(5))."""
    return nn.init.kaiming_uniform_(torch.empty(*shape), a=math.sqrt(5))


def zeros_or_uniform(init_weights: bool, *shape: int) -> Tensor:
    """What B starts from: zeros, or :func:`uniform` where `init_weights` is False, so that tests see an effect."""
    return torch.zeros(*shape) if init_weights else uniform(*shape)


@dataclass
class AdaptedConfig(PeftConfig):
    """The fields that every method of the package has, as peft.LoraConfig has them."""

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    #: The method's name, by which it is registered.
    method: ClassVar[str]
    #: Whether the method is for MLPs, whatever its targets are called.
    for_mlps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(getattr(self, "method", None), str):
            raise TypeError(f"{type(self).__name__} has no `method`: derive a config from it that names its method")
        kind = method_type(self.method)
        # A config of an adapter that an earlier version saved gives the type as a plain string without our name.
        self.earlier = type(self.peft_type) is str and self.peft_type == kind.value
        self.peft_type: Any = kind
        if isinstance(self.target_modules, str) and (
            self.layers_to_transform is not None or self.layers_pattern is not None
        ):
            raise ValueError("layers_to_transform and layers_pattern need target_modules as a list of names")
        if self.layers_pattern and self.layers_to_transform is None and not self.earlier:
            raise ValueError("layers_pattern says where the numbers of layers_to_transform stand: give both")
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)

    def of_module(self, key: str) -> Any:
        """The config with what it says of the module `key` alone."""
        return self

    def to_dict(self) -> dict:
        """What is saved."""
        return super().to_dict() | {"peft_type": type_in_file(type(self))}


# What PeftModel's classes for these tasks add to modules_to_save: whichever of them the model has.
_HEADS = {"SEQ_CLS": {"classifier", "score"}, "TOKEN_CLS": {"classifier", "score"}, "QUESTION_ANS": {"qa_outputs"}}


def check_modules_to_save(config: Any, names: Iterable[str]) -> None:
    """Checks that every entry of modules_to_save names a module; PEFT ignores others, and these parts stay frozen.

    Args:
        config: the adapter's.
        names: of the model's modules.

    Raises:
        TypeError, ValueError: it is no list of names, or an entry names no module.
    """
    wanted, names = getattr(config, "modules_to_save", None) or (), list(names)
    if isinstance(wanted, str):  # PEFT would take its letters
        raise TypeError(f"modules_to_save must be a list of names, got {wanted!r}")
    heads = _HEADS.get(config.task_type, set())
    # As PEFT: by the end of the name.
    unknown = sorted(each for each in set(wanted) - heads if not any(name.endswith(each) for name in names))
    if unknown:
        raise ValueError(f"modules_to_save: no module of this model is called {', '.join(map(repr, unknown))}")


class AdaptedLinear(nn.Module, Mergeable):
    """A linear layer with adapters of one method.

    Subclasses name their parameters, make them in `update_layer`, keep each adapter's rank in `r`, compute in
    `_adapted`, and say in `_merged` what merging makes of the base layer's weight.
    """

    gci_impl = "auto"  # of the layer's op; gci_kernels.patch sets another on the instance
    base_layer: nn.Module
    scaling: dict[str, Any]  # numbers, or tensors of one
    update_layer: Callable[..., None]
    #: Where the adapters' Settings are; among other_param_names.
    settings_name: ClassVar[str]
    #: Parameters that earlier versions called otherwise: former name -> present one.
    former_names: ClassVar[Mapping[str, str]] = {}

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        for parameters in self.adapter_layer_names:
            setattr(self, parameters, nn.ParameterDict())
        for settings in self.other_param_names:
            setattr(self, settings, nn.ModuleDict() if settings == self.settings_name else {})
        self._disable_adapters = False
        self._active_adapter = name
        self.merged_adapters, self.merges = [], []
        sizes: Any = _get_in_out_features(self.get_base_layer())
        self.in_features, self.out_features = sizes

    def settings_of(self, config: Any) -> dict[str, float]:
        """What an adapter of `config` computes with here and its tensors' shapes do not show."""
        raise NotImplementedError

    def record(self, name: str, config: Any, where: str) -> None:
        """Lets the adapter be saved with its settings; `where`: the layer's name in the model."""
        self.key = where
        getattr(self, self.settings_name)[name] = adapter_file.Settings(where, self.settings_of(config))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for former, present in self.former_names.items():
            for key in [key for key in state_dict if key.startswith(f"{prefix}{former}.")]:
                state_dict[f"{prefix}{present}.{key.removeprefix(f'{prefix}{former}.')}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def adapters(self) -> Sequence[str]:
        """The active adapters that this layer has."""
        return among(self._active_adapter, self.r)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out] in the base layer's dtype; `adapter_names`: one for each row of x, in inference."""
        mix = None if mixed.thread.state.batch is None else mixed.current(self)
        if adapter_names is not None:
            mix = mixed.MixedBatch(adapter_names)
        if mix is None and not (self._disable_adapters or self.merged_adapters or args or kwargs):
            active: Any = self._active_adapter
            if type(active) is str or len(active) != 1 or active[0] not in self.r:  # rare
                active = among(active, self.r)
            return self._adapted(x, active)
        if args or kwargs:
            raise TypeError(
                f"{self.method_name} layers take x alone, got {len(args)} more arguments and {sorted(kwargs)}"
            )
        if not self._disable_adapters and not self.merged_adapters:
            return self._mixed(x, mix)
        if self.merged and mix is not None:
            raise ValueError("adapter_names: an adapter is merged into the base layer; call unmerge_adapter() first")
        if self.disable_adapters and self.merged:
            self.unmerge()  # as PEFT's layers: what is disabled does not show
        return self.base_layer(x)

    def _adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        raise NotImplementedError

    def _mixed(self, x: Tensor, mix: Any) -> Tensor:
        """As :meth:`_adapted`, each row of x with its own adapter."""
        raise NotImplementedError

    def describe(self, name: str) -> str:
        """The adapter's shape, short: for reports."""
        raise NotImplementedError

    def plan(self, tokens: int, dtype: torch.dtype, device_type: str) -> str:
        """What the layer runs for x [tokens, in]; ValueError where its `impl` cannot run."""
        raise NotImplementedError

    def parameter(self, part: str, name: str) -> Any:
        """The adapter's parameter, looked up without the container's own costly lookup; an offloaded one is copied."""
        container: Any = self._modules[part]
        try:
            found = container._parameters[name]
        except KeyError:  # a replica of torch.nn.DataParallel, whose parameters are plain attributes
            return getattr(container, name)
        if HOOK in container.__dict__ and found.is_meta:
            return hooks.onload(container, name, found)
        return found

    def decode_plan(self, dtype: torch.dtype, device_type: str) -> DecodePlan | None:
        """What a decoding step of one token launches for the first active adapter, None: the plan's stages."""
        return None

    def extra_repr(self) -> str:
        """What printing the model shows of the layer: its adapters by name."""
        return ", ".join(f"{name}: {self.describe(name)}" for name in self.r)


class AdaptedModel(BaseTuner):
    """PEFT's tuner for layers of :class:`AdaptedLinear`."""

    gci_impl = "auto"  # what new layers get; gci_kernels.patch sets another on the instance
    tuner_layer_cls: type[Any]

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # PEFT's models give a dictionary, and load through the renaming below; transformers' load_adapter does neither.
        if isinstance(peft_config, AdaptedConfig) and peft_config.earlier and self._renamed(peft_config):
            raise ValueError(
                f"adapter {adapter_name!r} was saved by an earlier gci_kernels, with other names in it: load it with "
                "peft.PeftModel.from_pretrained and save it again with save_pretrained"
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def _renamed(self, config: Any) -> bool:
        """Whether an adapter of `config` has parameters that earlier versions called otherwise."""
        return bool(self.tuner_layer_cls.former_names)

    def _new_layer(self, target: nn.Module, name: str, config: Any, key: str) -> AdaptedLinear:
        """A layer around `target` that has no adapter yet."""
        return self.tuner_layer_cls(target, name)

    def _update_layer(self, layer: Any, name: str, config: Any, key: str) -> None:
        layer.update_layer(name, config)

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        adapted = isinstance(target, self.tuner_layer_cls)
        if not adapted and not fusion.is_linear(base):
            raise TypeError(
                f"target_modules: {current_key} is a {type(base).__name__}; {self.tuner_layer_cls.method_name} adapts "
                "torch.nn.Linear, layers derived from it, transformers' Conv1D, and quantised layers that PEFT knows"
            )
        if sharding.is_tensor_parallel(base):
            raise ValueError(sharding.refusal(self.tuner_layer_cls.method_name, current_key))
        config = peft_config.of_module(current_key)
        # The whole base weight, on the device where the layer computes, is there for the new adapter.
        with gather_params_ctx(list(base.parameters(recurse=False)), modifier_rank=None), hooks.onloaded(base):
            layer: Any = target if adapted else self._new_layer(target, adapter_name, config, current_key)
            self._update_layer(layer, adapter_name, config, current_key)
            layer.record(adapter_name, config, current_key)
            if not adapted:
                if self.gci_impl != layer.gci_impl:
                    layer.gci_impl = self.gci_impl
                self._replace_module(parent, target_name, layer.train(target.training), target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, and what it does not know of: modules that use a weight without calling its layer, and experts."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        parents.disable_fast_paths(model)
        experts.warn(model, self.peft_config[adapter_name], self.tuner_layer_cls.method_name)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        parents.restore_fast_paths(model)
        return model

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config  # without PEFT's defaults for target_modules

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if not peft_config.earlier:
            check_modules_to_save(peft_config, (name for name, _ in model.named_modules()))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The file's keys as the model has them; a file that does not fit is refused."""
        state_dict = adapter_file.rename(state_dict, cls.tuner_layer_cls.former_names)
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        adapter_file.check_keys(cls.prefix, adapter_name, model.state_dict(), found)
        return found

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Runs a forward or generate(), whose arguments it gets, as a mixed batch if there are adapter_names."""
        if kwargs.get("adapter_names") is None:
            with shared_input.forward():
                yield
            return
        known = {name for layer in self.modules() if isinstance(layer, AdaptedLinear) for name in layer.r}
        names = mixed.checked_names(self, kwargs["adapter_names"], known)
        with mixed.enabled(self, names, args, kwargs, (AdaptedLinear,), (AuxiliaryTrainingWrapper,)):
            yield
