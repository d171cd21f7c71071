"""LoRAMoE (arXiv 2312.09979) as the PEFT method GCI_LORAMOE."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from gci_kernels.limits import MAX_EXPERTS
from gci_kernels.ops.bottleneck import adapted_linear
from gci_kernels.ops.bottleneck.mixers import GATE
from gci_kernels.ops.decode import Group
from gci_kernels.tuners.balance import BalanceCollector
from gci_kernels.tuners.base import check_integer, check_number, uniform, zeros_or_uniform
from gci_kernels.tuners.bottleneck import BottleneckConfig, BottleneckLayer, BottleneckModel
from gci_kernels.tuners.methods import Method
from gci_kernels.tuners.registration import classes_of, register
from gci_kernels.tuners.shared_input import share


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

    method: ClassVar[str] = "LoRAMoE"
    for_mlps = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("num_experts", self.num_experts, 1, MAX_EXPERTS)
        if self.top_k is not None:
            check_integer("top_k", self.top_k, 1, self.num_experts)
        check_number("balance_weight", self.balance_weight, "at least 0", 0)
        check_number("balance_delta", self.balance_delta, "in [0, 1]", 0, 1)
        if self.balance_weight and self.num_experts % 2:
            raise ValueError(f"num_experts must be even where balance_weight is not 0, got {self.num_experts}")


def _parameters(config: LoRAMoEConfig, in_features: int, out_features: int) -> dict[str, Tensor]:
    """A [N*r, in], B [out, N*r] and router [N, in], experts stacked expert-major."""
    columns = config.num_experts * config.r
    A, router = uniform(columns, in_features), uniform(config.num_experts, in_features)
    return {"A": A, "B": zeros_or_uniform(config.init_weights, out_features, columns), "router": router}


class _Layer(BottleneckLayer):
    """A linear layer with LoRAMoE adapters, which hand their gates to the balancing constraint.

    Under each adapter's name: A [N*r, in], B [out, N*r] and router [N, in]. B's name among the parameters has "lora_B"
    in it: PEFT's LoRA+ finds the matrices with the higher learning rate by that.
    """

    former_names = {"loramoe_B": "loramoe_lora_B"}
    collector: BalanceCollector

    def _update(self, x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y, gates = adapted_linear(*self._arguments(x, name, weight, bias), share, self)
        config = self.configs[name]
        if config.balance_weight and self.collector.active:
            trained = self.tensors(name)[2].requires_grad
            self.collector.record(self.key, gates, y, config=config, trained=trained)
        return y

    def _group(self, name: str, count: int, first: int = 0) -> Group | None:
        if self.collector.passes and self.collector.active:
            return None
        return super()._group(name, count, first)


class _Model(BottleneckModel):
    """PEFT's tuner for GCI_LORAMOE. Made by get_peft_model, PeftModel.from_pretrained or gci_kernels.patch."""

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        # transformers makes a tuner for each adapter that it loads; a model has one collector.
        layers = (module for module in model.modules() if isinstance(module, LoRAMoELinear))
        first = next(layers, None)
        self.collector = BalanceCollector() if first is None else first.collector

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self.collector.attach(model, [layer.key for layer in model.modules() if isinstance(layer, LoRAMoELinear)])

    def _new_layer(self, target: nn.Module, name: str, config: LoRAMoEConfig, key: str) -> BottleneckLayer:
        layer = LoRAMoELinear(target, name)
        layer.collector = self.collector
        return layer

    def _detach(self) -> None:
        self.collector.detach()


LORAMOE = register(
    Method(
        LoRAMoEConfig,
        GATE,
        _parameters,
        describe=lambda config: f"{config.num_experts}x{config.r}",
        example=LoRAMoEConfig(r=4, num_experts=4, init_weights=False),
        settings=lambda config: (config.top_k or config.num_experts,),
        saved=("r", "num_experts", "lora_alpha", "top_k"),
        default_targets=("gate_proj", "up_proj", "down_proj"),
        prefix="loramoe_",
        depends_on="each token's gates",
    ),
    _Layer,
    _Model,
)
LoRAMoELinear, LoRAMoEModel = classes_of(LORAMOE)
