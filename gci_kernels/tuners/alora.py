"""ALoRA (arXiv 2405.17830) as the PEFT method GCI_ALORA."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gci_kernels import sequence
from gci_kernels.ops import alora_linear
from gci_kernels.ops.attention.api import check_heads
from gci_kernels.ops.decode import find_step
from gci_kernels.tuners.base import BottleneckConfig, BottleneckLayer, BottleneckModel, check_integer, register


@dataclass
class ALoRAConfig(BottleneckConfig):
    """Configuration of ALoRA: LoRA with causal attention over the sequence in its rank-r space.

    Not PEFT's Activated LoRA, which shares the letters.

    Args:
        r: rank, at most 256.
        num_heads: heads of the attention, a divisor of r; r / num_heads at most 64.
        lora_alpha: scaling = lora_alpha / r.
        lora_dropout: probability in [0, 1), on what A sees of x.
        residual: add z = x @ A.T to the attention's output.
        target_modules: names (suffixes), a regular expression, or "all-linear"; None: q_proj, k_proj, v_proj, o_proj.
        exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in peft.LoraConfig.
        init_weights: True: A uniform as in LoRA, q and k rows Xavier, v rows the identity, B zeros; False: B random
            too, so that tests see an effect.
    """

    num_heads: int = 4
    residual: bool = False

    method: ClassVar[str] = "GCI_ALORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("num_heads", self.num_heads, 1)
        check_heads(self.r, self.num_heads)
        if not isinstance(self.residual, bool):
            raise TypeError(f"residual must be True or False, got {self.residual!r}")


class ALoRALinear(BottleneckLayer):
    """A linear layer with ALoRA adapters; its forward is :func:`gci_kernels.ops.alora_linear`.

    Under each adapter's name: A [r, in], qkv [3r, r] and B [out, r]. What the sequence is, and the k and v of past
    tokens in generation, it learns from gci_kernels.sequence; outside of its model's forward it raises.
    """

    adapter_layer_names = ("gci_alora_A", "gci_alora_qkv", "gci_alora_B")
    other_param_names = ("r", "num_heads", "scaling", "dropout_p", "residual")
    method_name, mixer = "ALoRA", "attention"
    no_merge = "ALoRA cannot be merged into the base weight: its update depends on the other tokens; use unload()"

    def __init__(self, base_layer: nn.Module, name: str, config: ALoRAConfig, key: str) -> None:
        super().__init__(base_layer, name)
        self.key = key  # in the adapter's cache: the layer's name in the model
        self.update_layer(name, config)

    def update_layer(self, name: str, config: ALoRAConfig) -> None:
        """Adds the adapter `name`, or makes it anew."""
        self.r[name], self.num_heads[name], self.residual[name] = config.r, config.num_heads, config.residual
        self.scaling[name], self.dropout_p[name] = config.lora_alpha / config.r, config.lora_dropout
        self.gci_alora_A[name] = nn.Parameter(torch.empty(config.r, self.in_features))
        self.gci_alora_qkv[name] = nn.Parameter(torch.empty(3 * config.r, config.r))
        self.gci_alora_B[name] = nn.Parameter(torch.empty(self.out_features, config.r))
        self.reset_parameters(name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, name: str, init_weights: bool) -> None:
        """A uniform as in LoRA, q and k Xavier, v the identity; B zeros, or uniform where `init_weights` is False."""
        nn.init.kaiming_uniform_(self.gci_alora_A[name], a=math.sqrt(5))
        q, k, v = self.gci_alora_qkv[name].chunk(3)
        with torch.no_grad():
            nn.init.xavier_uniform_(q)
            nn.init.xavier_uniform_(k)
            nn.init.eye_(v)
        if init_weights:
            nn.init.zeros_(self.gci_alora_B[name])
        else:
            nn.init.kaiming_uniform_(self.gci_alora_B[name], a=math.sqrt(5))

    def _update(self, x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        context = sequence.required()
        rows = x.view(*context.shape, x.shape[-1])  # some models give their inner layers [batch * time, features]
        past = context.past(self.key, name, rows.new_empty(rows.shape[0], 0, 2 * self.r[name]))
        y, kv = alora_linear(
            rows, weight, bias,
            self.gci_alora_A[name], self.gci_alora_qkv[name], self.gci_alora_B[name],
            num_heads=self.num_heads[name], scaling=self.scaling[name], residual=self.residual[name],
            dropout_p=self.dropout_p[name] if self.training else 0.0,
            sequence=context.sequence, past=past,
        )  # fmt: skip
        context.keep(self.key, name, kv)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _add_step(self, y: Tensor, x: Tensor, name: str) -> bool:
        if self.training and self.dropout_p[name]:
            return False
        A, qkv, B = (self.parameter(part, name) for part in self.adapter_layer_names)
        step, context = find_step(x, A, None, B, scaling=self.scaling[name]), sequence.required()
        segments, batch = context.sequence.segments, context.shape[0]
        if (
            step is None
            or y.dtype != x.dtype
            or qkv.dtype != A.dtype
            or not (y.is_contiguous() and qkv.is_contiguous())
        ):
            return False
        kv = context.room(self.key, name, x.new_empty(batch, 0, 2 * self.r[name]))
        if kv is None:
            return False
        if segments is not None and segments.stride(1) != 1:
            segments = segments.contiguous()
        step.attend(
            y, x.contiguous(), qkv, kv, context.sequence.past, segments,
            num_heads=self.num_heads[name], residual=self.residual[name],
        )  # fmt: skip
        return True

    def describe(self, name: str) -> str:
        return f"r={self.r[name]}, {self.num_heads[name]} heads" + (", residual" if self.residual[name] else "")


class ALoRAModel(BottleneckModel):
    """PEFT's tuner for GCI_ALORA. Made by get_peft_model, PeftModel.from_pretrained or gci_kernels.patch."""

    prefix = "gci_alora_"
    tuner_layer_cls = ALoRALinear
    default_targets = ("q_proj", "k_proj", "v_proj", "o_proj")

    def _pre_injection_hook(self, model: nn.Module, config: ALoRAConfig, adapter_name: str) -> None:
        if not hasattr(self, "adapted"):
            self.adapted: list[ALoRALinear] = []

    def _post_injection_hook(self, model: nn.Module, config: ALoRAConfig, adapter_name: str) -> None:
        self.attached = sequence.attach(model, self.wanted)

    def _new_layer(self, target: nn.Module, name: str, config: ALoRAConfig, key: str) -> ALoRALinear:
        self.adapted.append(ALoRALinear(target, name, config, key))
        return self.adapted[-1]

    def wanted(self) -> Iterator[tuple[str, str]]:
        """(layer's key, adapter) of every past that the next forward asks for."""
        for layer in self.adapted:
            if not layer.disable_adapters:
                yield from ((layer.key, name) for name in layer.adapters())

    def _detach(self) -> None:
        self.attached.detach()


register(ALoRAConfig, ALoRAModel)
