"""LoRAMoE (arXiv 2312.09979) as the PEFT method GCI_LORAMOE."""

import contextlib
import math
from dataclasses import dataclass, field

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gci_kernels.ops import loramoe_linear
from gci_kernels.tuners import fusion
from gci_kernels.tuners.balance import BalanceCollector

PEFT_TYPE = "GCI_LORAMOE"
DEFAULT_TARGETS = ("gate_proj", "up_proj", "down_proj")


def _check_integer(name: str, value: int, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be at least {low}{'' if high is None else f' and at most {high}'}, got {value}")


def _check_number(name: str, value: float, allowed: str, low: float = -math.inf, high: float = math.inf) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} must be {allowed}, got {value}")


@dataclass
class LoRAMoEConfig(PeftConfig):
    """Configuration of LoRAMoE: N LoRA experts and a router in every adapted projection.

    Args:
        r: rank of one expert.
        num_experts: experts in a layer, at most 256; even where balance_weight is not 0.
        lora_alpha: scaling = lora_alpha / r.
        lora_dropout: probability in [0, 1); one mask is shared by a layer's experts.
        top_k: keep each token's k largest gates, renormalised; None: all, as published.
        balance_weight: weight of the localized balancing constraint; 0.1 in the paper. It joins the model's loss in
            training when the batch holds `task_types` [batch]: 0 or 1 for each sample.
        balance_delta: how far the constraint pulls the two groups of experts apart, in [0, 1].
        balance_include_padding: count padding tokens in the constraint, as the published code does.
        target_modules: names (suffixes), a regular expression, or "all-linear"; None: gate_proj, up_proj, down_proj.
        exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in peft.LoraConfig.
        init_weights: True: A and router uniform as in LoRA, B zeros; False: B random too, so that tests see an effect.
    """

    r: int = 4
    num_experts: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    top_k: int | None = None
    balance_weight: float = 0.0
    balance_delta: float = 0.1
    balance_include_padding: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        _check_integer("r", self.r, 1)
        _check_integer("num_experts", self.num_experts, 1, 256)
        if self.top_k is not None:
            _check_integer("top_k", self.top_k, 1, self.num_experts)
        _check_number("lora_alpha", self.lora_alpha, "a finite number")
        _check_number("lora_dropout", self.lora_dropout, "in [0, 1)", 0, math.nextafter(1, 0))
        _check_number("balance_weight", self.balance_weight, "at least 0", 0)
        _check_number("balance_delta", self.balance_delta, "in [0, 1]", 0, 1)
        if self.balance_weight and self.num_experts % 2:
            raise ValueError(f"num_experts must be even where balance_weight is not 0, got {self.num_experts}")
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


class LoRAMoELayer(BaseTunerLayer):
    """The adapters of one layer: A [N*r, in], B [out, N*r] and router [N, in] under each adapter's name."""

    adapter_layer_names = ("loramoe_A", "loramoe_B", "loramoe_router")
    other_param_names = ("r", "num_experts", "scaling", "dropout_p", "top_k", "balance")

    def __init__(self, base_layer: nn.Module, collector: BalanceCollector) -> None:
        self.base_layer = base_layer
        self.collector = collector
        self.loramoe_A = nn.ParameterDict()
        self.loramoe_B = nn.ParameterDict()
        self.loramoe_router = nn.ParameterDict()
        self.r: dict[str, int] = {}
        self.num_experts: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.dropout_p: dict[str, float] = {}
        self.top_k: dict[str, int | None] = {}
        self.balance: dict[str, tuple[float, float, bool]] = {}  # weight, delta, include_padding
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def update_layer(self, name: str, config: LoRAMoEConfig) -> None:
        """Adds the adapter `name`, or makes it anew."""
        width = config.num_experts * config.r
        self.r[name], self.num_experts[name], self.top_k[name] = config.r, config.num_experts, config.top_k
        self.scaling[name], self.dropout_p[name] = config.lora_alpha / config.r, config.lora_dropout
        self.balance[name] = (config.balance_weight, config.balance_delta, config.balance_include_padding)
        self.loramoe_A[name] = nn.Parameter(torch.empty(width, self.in_features))
        self.loramoe_B[name] = nn.Parameter(torch.empty(self.out_features, width))
        self.loramoe_router[name] = nn.Parameter(torch.empty(config.num_experts, self.in_features))
        self.reset_parameters(name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, name: str, init_weights: bool) -> None:
        nn.init.kaiming_uniform_(self.loramoe_A[name], a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.loramoe_router[name], a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(self.loramoe_B[name])
        else:
            nn.init.kaiming_uniform_(self.loramoe_B[name], a=math.sqrt(5))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        raise ValueError(NO_MERGE)


NO_MERGE = "LoRAMoE cannot be merged into the base weight: its update depends on each token's gates; use unload()"


class LoRAMoELinear(nn.Module, LoRAMoELayer):
    """A linear layer with LoRAMoE adapters; its forward is :func:`gci_kernels.ops.loramoe_linear`.

    x [..., in] -> [..., out] in the base layer's dtype. Several active adapters add up.
    """

    def __init__(self, base_layer: nn.Module, name: str, config: LoRAMoEConfig, collector: BalanceCollector) -> None:
        super().__init__()
        LoRAMoELayer.__init__(self, base_layer, collector)
        self._active_adapter = name
        self.update_layer(name, config)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs:
            raise TypeError(f"LoRAMoE layers take x alone, got {len(args)} more arguments and {sorted(kwargs)}")
        if self.disable_adapters:
            return self.base_layer(x)
        names = [name for name in self.active_adapters if name in self.loramoe_A]
        return fusion.combine(self.base_layer, x, names, lambda *arguments: self._update(x, *arguments))

    def _update(self, x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        router = self.loramoe_router[name]
        y, gates = loramoe_linear(
            x, weight, bias, self.loramoe_A[name], self.loramoe_B[name], router,
            scaling=self.scaling[name], top_k=self.top_k[name],
            dropout_p=self.dropout_p[name] if self.training else 0.0,
        )  # fmt: skip
        balance_weight, delta, include_padding = self.balance[name]
        if self.collector.active and balance_weight:
            self.collector.record(
                gates, weight=balance_weight, delta=delta, include_padding=include_padding,
                trained=router.requires_grad,
            )  # fmt: skip
        return y

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {self.num_experts[name]} experts of rank {self.r[name]}" for name in self.loramoe_A)


class LoRAMoEModel(BaseTuner):
    """PEFT's tuner for GCI_LORAMOE. Made by get_peft_model, PeftModel.from_pretrained or gci_kernels.patch."""

    prefix = "loramoe_"
    tuner_layer_cls = LoRAMoELayer

    def _pre_injection_hook(self, model: nn.Module, config: LoRAMoEConfig, adapter_name: str) -> None:
        self.collector = BalanceCollector()

    def _post_injection_hook(self, model: nn.Module, config: LoRAMoEConfig, adapter_name: str) -> None:
        self.hook_handles = self.collector.attach(model)

    def _prepare_adapter_config(self, peft_config: LoRAMoEConfig, model_config: dict) -> LoRAMoEConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = set(DEFAULT_TARGETS)
        return peft_config

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if isinstance(target, LoRAMoELayer):
            target.update_layer(adapter_name, peft_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, (nn.Linear, Conv1D)):
            raise TypeError(
                f"target_modules: {current_key} is a {type(base).__name__}; LoRAMoE adapts torch.nn.Linear, layers "
                "derived from it, and transformers' Conv1D"
            )
        layer = LoRAMoELinear(target, adapter_name, peft_config, self.collector).train(target.training)
        self._replace_module(parent, target_name, layer, target)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """PEFT's way into mixed batches; without it PEFT would drop the argument."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: LoRAMoE does not run several adapters in one batch; use set_adapter")
        yield

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs) -> nn.Module:
        if merge:
            raise ValueError(NO_MERGE)
        model = super()._unload_and_optionally_merge(merge=False, **kwargs)
        for handle in self.hook_handles:
            handle.remove()
        return model


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = LoRAMoEConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = LoRAMoEModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = LoRAMoEModel.prefix
