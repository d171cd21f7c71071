"""LoRAMoE (arXiv 2312.09979) as the PEFT method GCI_LORAMOE."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft.config import PeftConfig
from torch import Tensor, nn

from gci_kernels.ops import loramoe_linear
from gci_kernels.ops.decode import Group
from gci_kernels.tuners.balance import BalanceCollector
from gci_kernels.tuners.base import (
    BottleneckConfig,
    BottleneckLayer,
    BottleneckModel,
    check_integer,
    check_number,
)
from gci_kernels.tuners.methods import Method, register
from gci_kernels.tuners.scaling import applied, number


@dataclass
class LoRAMoEConfig(BottleneckConfig):
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
        rank_pattern, alpha_pattern: other r and lora_alpha by module: names (suffixes) or regular expressions, as in
            peft.LoraConfig.
        init_weights: True: A and router uniform as in LoRA, B zeros; False: B random too, so that tests see an effect.
    """

    r: int = 4
    num_experts: int = 8
    top_k: int | None = None
    balance_weight: float = 0.0
    balance_delta: float = 0.1
    balance_include_padding: bool = False

    method: ClassVar[Method] = Method.GCI_LORAMOE
    for_mlps = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("num_experts", self.num_experts, 1, 256)
        if self.top_k is not None:
            check_integer("top_k", self.top_k, 1, self.num_experts)
        check_number("balance_weight", self.balance_weight, "at least 0", 0)
        check_number("balance_delta", self.balance_delta, "in [0, 1]", 0, 1)
        if self.balance_weight and self.num_experts % 2:
            raise ValueError(f"num_experts must be even where balance_weight is not 0, got {self.num_experts}")


class LoRAMoELinear(BottleneckLayer):
    """A linear layer with LoRAMoE adapters; its forward is :func:`gci_kernels.ops.loramoe_linear`.

    Under each adapter's name: A [N*r, in], B [out, N*r] and router [N, in]. B's name among the parameters has "lora_B"
    in it: PEFT's LoRA+ finds the matrices with the higher learning rate by that.
    """

    adapter_layer_names = ("loramoe_A", "loramoe_lora_B", "loramoe_router")
    other_param_names = ("r", "num_experts", "scaling", "dropout_p", "top_k", "balance", "loramoe_settings")
    settings_name = "loramoe_settings"
    former_names = {"loramoe_B": "loramoe_lora_B"}
    num_experts: dict[str, int]
    dropout_p: dict[str, float]
    top_k: dict[str, int | None]
    balance: dict[str, tuple[float, float, bool]]
    loramoe_A: nn.ParameterDict
    loramoe_lora_B: nn.ParameterDict
    loramoe_router: nn.ParameterDict
    method_name, mixer = "LoRAMoE", "gate"
    no_merge = "LoRAMoE cannot be merged into the base weight: its update depends on each token's gates; use unload()"

    def __init__(self, base_layer: nn.Module, name: str, config: LoRAMoEConfig, collector: BalanceCollector) -> None:
        super().__init__(base_layer, name)
        self.collector = collector
        self.update_layer(name, config)

    def update_layer(self, name: str, config: LoRAMoEConfig) -> None:
        """Adds the adapter `name`, or makes it anew."""
        width = config.num_experts * config.r
        self.r[name], self.num_experts[name], self.top_k[name] = config.r, config.num_experts, config.top_k
        self.scaling[name], self.dropout_p[name] = config.lora_alpha / config.r, config.lora_dropout
        self.balance[name] = (config.balance_weight, config.balance_delta, config.balance_include_padding)
        self.loramoe_A[name] = nn.Parameter(torch.empty(width, self.in_features))
        self.loramoe_lora_B[name] = nn.Parameter(torch.empty(self.out_features, width))
        self.loramoe_router[name] = nn.Parameter(torch.empty(config.num_experts, self.in_features))
        self.reset_parameters(name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, name: str, init_weights: bool) -> None:
        """A and router uniform as in LoRA; B zeros, or uniform where `init_weights` is False."""
        nn.init.kaiming_uniform_(self.loramoe_A[name], a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.loramoe_router[name], a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(self.loramoe_lora_B[name])
        else:
            nn.init.kaiming_uniform_(self.loramoe_lora_B[name], a=math.sqrt(5))

    def _update(self, x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        A, B, router = (self.parameter(part, name) for part in self.adapter_layer_names)
        scaling, B = applied(self.scaling[name], B)
        y, gates = loramoe_linear(
            x, weight, bias, A, B, router, scaling=scaling, top_k=self.top_k[name],
            dropout_p=self.dropout_p[name] if self.training else 0.0, impl=self.gci_impl,
        )  # fmt: skip
        balance_weight, delta, include_padding = self.balance[name]
        if self.collector.active and balance_weight:
            self.collector.record(
                self.key, gates, y, weight=balance_weight, delta=delta, include_padding=include_padding,
                trained=router.requires_grad,
            )  # fmt: skip
        return y

    def _has_step(self, name: str) -> bool:
        return not self.collector.active and super()._has_step(name)

    def _group(self, name: str, count: int, first: int = 0) -> Group:
        A, B, router = (self.parameter(part, name) for part in self.adapter_layer_names)
        return Group(A, B, number(self.scaling[name]), first, count, router, self.top_k[name])

    def settings_of(self, config: LoRAMoEConfig) -> dict[str, float]:
        names = ("r", "num_experts", "lora_alpha")
        return {name: getattr(config, name) for name in names} | {"top_k": config.top_k or 0}

    def describe(self, name: str) -> str:
        return f"{self.num_experts[name]}x{self.r[name]}"


class LoRAMoEModel(BottleneckModel):
    """PEFT's tuner for GCI_LORAMOE. Made by get_peft_model, PeftModel.from_pretrained or gci_kernels.patch."""

    prefix = "loramoe_"
    tuner_layer_cls = LoRAMoELinear
    default_targets = ("gate_proj", "up_proj", "down_proj")

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        # transformers makes a tuner for each adapter that it loads; a model has one collector.
        layers = (module for module in model.modules() if isinstance(module, LoRAMoELinear))
        first = next(layers, None)
        self.collector = BalanceCollector() if first is None else first.collector

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.collector.attach(model, [layer.key for layer in model.modules() if isinstance(layer, LoRAMoELinear)])

    def _new_layer(self, target: nn.Module, name: str, config: LoRAMoEConfig, key: str) -> LoRAMoELinear:
        return LoRAMoELinear(target, name, config, self.collector)

    def _detach(self) -> None:
        self.collector.detach()


register(LoRAMoEConfig, LoRAMoEModel)
