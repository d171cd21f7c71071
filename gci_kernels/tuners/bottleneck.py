"""One config base, layer and tuner for every method whose layers are bottleneck adapters."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from gci_kernels.models import experts, parents
from gci_kernels.models.targets import is_all_linear, matched
from gci_kernels.ops.arguments import new_record
from gci_kernels.ops.bottleneck import adapted_linear, choose_plan
from gci_kernels.ops.bottleneck.shared_input import Arguments
from gci_kernels.ops.decode import Group
from gci_kernels.tuners import fusion, mixed
from gci_kernels.tuners.base import AdaptedConfig, AdaptedLinear, AdaptedModel, check_integer, check_number
from gci_kernels.tuners.fused_layer import FusedLayer
from gci_kernels.tuners.methods import Method, new_tensors, settings_of
from gci_kernels.tuners.scaling import applied, number
from gci_kernels.tuners.shared_input import share


@dataclass
class BottleneckConfig(AdaptedConfig):
    """The fields that every bottleneck method has; the subclasses say what they mean, and name their `method`."""

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("r", self.r, 1)
        check_number("lora_alpha", self.lora_alpha, "a finite number")
        check_number("lora_dropout", self.lora_dropout, "in [0, 1)", 0, math.nextafter(1, 0))
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


class BottleneckLayer(FusedLayer, AdaptedLinear):
    """A linear layer with adapters of one registered method, which add to its output; several active ones add up.

    Under each adapter's name: its parameters, by the method's prefix and their names; its config in `configs`.
    """

    method: ClassVar[Method]
    roles: ClassVar[tuple[str, ...]]  # what the method calls its tensors: A, B and the mixer's weights
    settings: dict[str, tuple[int, ...]]  # the mixer's numbers
    dropout_p: dict[str, float]
    configs: dict[str, Any]

    def update_layer(self, name: str, config: Any) -> None:
        """Adds the adapter `name`, or makes it anew."""
        made = new_tensors(self.method, config, self.in_features, self.out_features)
        if tuple(made) != self.roles:
            raise ValueError(
                f"method {self.method.name!r}: `parameters` returned {', '.join(made)} for a layer "
                f"{self.in_features} -> {self.out_features}, and {', '.join(self.roles)} when it was registered"
            )
        self.configs[name], self.r[name], self.settings[name] = config, config.r, settings_of(self.method, config)
        self.scaling[name], self.dropout_p[name] = config.lora_alpha / config.r, config.lora_dropout
        for container, tensor in zip(self.adapter_layer_names, made.values(), strict=True):
            getattr(self, container)[name] = nn.Parameter(tensor)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def tensors(self, name: str) -> Sequence[Any]:
        """A, B and the mixer's weights of one adapter; None in their place where it has none."""
        found: list[Any] = []
        for container in self.adapter_layer_names:
            own: Any = self._modules[container]
            # Looked up as an item: the dictionary may be one that gathers a sharded parameter (DeepSpeed's ZeRO-3).
            tensor = own._parameters[name] if name in own._parameters else None
            # A replica of torch.nn.DataParallel keeps them elsewhere, and an offloaded one has to be brought.
            found.append(self.parameter(container, name) if tensor is None or tensor.is_meta else tensor)
        return found if len(found) == 3 else (*found, None)

    def _arguments(
        self, x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None,
        segments: Tensor | None = None, past: Tensor | None = None,
    ) -> Arguments:  # fmt: skip
        """The arguments of adapted_linear for the adapter's addition, with the base product where a weight is given."""
        A, B, weights = self.tensors(name)
        scaling = self.scaling[name]
        if type(scaling) is not float:
            scaling, B = applied(scaling, B)
        dropout_p = self.dropout_p[name] if self.training else 0.0
        operands = x, weight, bias, A, B, weights, segments, past, None
        return operands, self.method.mixer, self.settings[name], scaling, dropout_p, self.gci_impl

    def shared_arguments(self, x: Tensor) -> Arguments | None:
        """See :class:`FusedLayer`."""
        names = () if self._disable_adapters or self.merged_adapters else self.adapters()
        found = fusion.shared_operands(self.base_layer) if len(names) == 1 else None
        return None if found is None else self._arguments(x, names[0], *found)

    def _update(self, x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return adapted_linear(*self._arguments(x, name, weight, bias), share, self)[0]

    def _mixed(self, x: Tensor, mix: mixed.MixedBatch) -> Tensor:
        mix.check(x, self)
        return self._run_mixed(x, mix.names, self.r)

    def _group(self, name: str, count: int, first: int = 0) -> Group | None:
        decode, scaling = self.method.mixer.decode, self.scaling[name]
        if type(scaling) is not float:
            scaling = number(scaling)
        if decode is None or scaling is None or self.training and self.dropout_p[name]:
            return None
        A, B, weights = self.tensors(name)
        return new_record(Group, (A, B, scaling, first, count, *decode(weights, self.settings[name])))

    def plan(self, tokens: int, dtype: torch.dtype, device_type: str) -> str:
        """What the layer runs for x [tokens, in]; ValueError where its `impl` cannot run."""
        return str(choose_plan(self.gci_impl, tokens, dtype, device_type, self.method.mixer.name))

    def settings_of(self, config: Any) -> dict[str, float]:
        """What an adapter of `config` computes with here and its tensors' shapes do not show."""
        return {name: getattr(config, name) or 0 for name in self.method.saved}

    def describe(self, name: str) -> str:
        """The adapter's size, short: for reports."""
        return self.method.describe(self.configs[name])

    def _check_merge(self, names: Sequence[str]) -> None:
        if self.method.mixer.merge is None:
            raise ValueError(no_merge(self.method))
        base = self.get_base_layer()
        if names and fusion.computes_otherwise(base):
            raise ValueError(
                f"{self.method.name} cannot be merged into a {type(base).__name__}, which computes something else than "
                "x @ W.T + b: use unload()"
            )

    def _merged(self, name: str, weight: Tensor) -> tuple[slice, dict[str, Tensor]]:
        """The whole weight, plus scaling * B @ merge(A)."""
        merge: Any = self.method.mixer.merge
        A, B, weights = self.tensors(name)
        wide = torch.promote_types(weight.dtype, torch.float32)
        scaling, B = applied(self.scaling[name], B.to(wide))
        weights = None if weights is None else weights.to(wide)
        change = scaling * (B @ merge(A.to(wide), weights, self.settings[name]))
        return slice(None), {"weight": (weight.to(wide) + change).to(weight.dtype)}


def no_merge(method: Method) -> str:
    """Why the method's adapters cannot be merged, and what to do."""
    return (
        f"{method.name} cannot be merged into the base weight: its update depends on {method.depends_on}; use unload()"
    )


class BottleneckModel(AdaptedModel):
    """PEFT's tuner for layers of :class:`BottleneckLayer`. Made by get_peft_model, from_pretrained or patch."""

    method: ClassVar[Method]

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        method, default = self.method, peft_config.target_modules is None
        if default:
            peft_config.target_modules = set(method.default_targets)
        found, names = matched(model, peft_config), peft_config.target_modules
        if not found and (hint := experts.hint(model)):
            names = names if isinstance(names, str) else ", ".join(method.default_targets if default else sorted(names))
            raise ValueError(f"{method.name} finds none of {names} in this model{hint}")
        if default or is_all_linear(names):
            parents.leave_out(model, peft_config, method.name, found)
        else:
            parents.refuse(model, method.name, found, "leave it out of target_modules, or add it to exclude_modules")

    def _detach(self) -> None:
        """Takes back what the tuner did to the model beside its layers."""

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge and self.method.mixer.merge is None:
            raise ValueError(no_merge(self.method))
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        self._detach()
        return model
