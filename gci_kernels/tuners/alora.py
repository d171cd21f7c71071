"""ALoRA (arXiv 2405.17830) as the PEFT method GCI_ALORA."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gci_kernels.generation import sequence
from gci_kernels.generation.forward_context import Context
from gci_kernels.models import decoder_layers
from gci_kernels.ops import Sequence, alora_linear
from gci_kernels.ops.arguments import autocast_dtype
from gci_kernels.ops.attention.api import check_heads
from gci_kernels.ops.decode import Group, find_step
from gci_kernels.tuners import fusion, mixed
from gci_kernels.tuners.base import BottleneckConfig, BottleneckLayer, BottleneckModel, check_integer
from gci_kernels.tuners.methods import Method, register
from gci_kernels.tuners.scaling import applied, number


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
        rank_pattern, alpha_pattern: other r and lora_alpha by module: names (suffixes) or regular expressions, as in
            peft.LoraConfig; num_heads has to divide every rank.
        init_weights: True: A uniform as in LoRA, q and k rows Xavier, v rows the identity, B zeros; False: B random
            too, so that tests see an effect.
    """

    num_heads: int = 4
    residual: bool = False

    method: ClassVar[Method] = Method.GCI_ALORA

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("num_heads", self.num_heads, 1)
        for rank in (self.r, *self.rank_pattern.values()):
            check_heads(rank, self.num_heads)
        if not isinstance(self.residual, bool):
            raise TypeError(f"residual must be True or False, got {self.residual!r}")


def mixed_key(names: list[str]) -> str:
    """What stands for the adapter in a cache that a mixed batch fills; no other batch may go on with it."""
    return f"a mix of {', '.join(names)}"


class ALoRALinear(BottleneckLayer):
    """A linear layer with ALoRA adapters; its forward is :func:`gci_kernels.ops.alora_linear`.

    Under each adapter's name: A [r, in], qkv [3r, r] and B [out, r]. What the sequence is, and the k and v of past
    tokens in generation, it learns from gci_kernels.generation.sequence; outside of its model's forward it raises.
    """

    adapter_layer_names = ("gci_alora_A", "gci_alora_qkv", "gci_alora_B")
    other_param_names = ("r", "num_heads", "scaling", "dropout_p", "residual", "gci_alora_settings")
    settings_name = "gci_alora_settings"
    num_heads: dict[str, int]
    dropout_p: dict[str, float]
    residual: dict[str, bool]
    gci_alora_A: nn.ParameterDict
    gci_alora_qkv: nn.ParameterDict
    gci_alora_B: nn.ParameterDict
    method_name, mixer = "ALoRA", "attention"
    no_merge = "ALoRA cannot be merged into the base weight: its update depends on the other tokens; use unload()"

    def __init__(self, base_layer: nn.Module, name: str, config: ALoRAConfig, key: str) -> None:
        super().__init__(base_layer, name)
        self.key = key  # in the adapter's cache: the layer's name in the model
        self.decoder_layers: tuple[int, ...] = ()  # the numbers of those that it lies in, several where it is shared
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

    def key_in(self, decoder_layer: int, run: int = 0) -> str:
        """Under which the cache keeps what this layer makes when `decoder_layer` runs, for the first time or again."""
        key = self.key if len(self.decoder_layers) < 2 else f"{self.key} of decoder layer {decoder_layer}"
        return f"{key}, run {run}" if run else key

    def _rows(self, x: Tensor, context: Context) -> Tensor:
        """x as [batch, time, in]; some models give their inner layers [batch * time, in]."""
        leading = tuple(x.shape[:-1])
        if leading == context.shape:
            return x
        batch, time = context.shape
        if math.prod(leading) != batch * time or leading == (time, batch):
            raise ValueError(
                f"{self.key} got x {list(x.shape)} in a forward of [batch, time] {context.shape}: ALoRA attends over "
                "the model's own tokens, in their order; leave this layer out by exclude_modules"
            )
        return x.view(batch, time, x.shape[-1])

    def _update(self, x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        context = sequence.required()
        rows, key = self._rows(x, context), self.key_in(context.layer, context.run)
        kept = rows.new_empty(rows.shape[0], 0, 2 * self.r[name], dtype=autocast_dtype(rows))
        past = context.past(key, name, kept)
        y, kv = self._attended(rows, name, weight, bias, context.sequence, past)
        context.keep(key, name, kv)
        return y if rows is x else y.view(*x.shape[:-1], y.shape[-1])

    def _attended(
        self, x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None, tokens: Sequence, past: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        A, qkv, B = (self.parameter(part, name) for part in self.adapter_layer_names)
        scaling, B = applied(self.scaling[name], B)
        return alora_linear(
            x, weight, bias, A, qkv, B,
            num_heads=self.num_heads[name], scaling=scaling, residual=self.residual[name],
            dropout_p=self.dropout_p[name] if self.training else 0.0, sequence=tokens, past=past,
            impl=self.gci_impl,
        )  # fmt: skip

    def _mixed(self, x: Tensor, mix: mixed.MixedBatch) -> Tensor:
        """Keys and values of all adapters share one entry of the cache, as wide as the widest of them."""
        context, key = sequence.required(), mixed_key(mix.names)
        rows, layer_key = self._rows(x, context), self.key_in(context.layer, context.run)
        mix.check(rows, self)
        tokens = mixed.Tokens(rows, mix.expanded(rows.shape[0]), self.r)
        width = max((2 * self.r[name] for name in tokens.samples), default=0)
        kept: list[Any] = []

        def step(rows, weight, bias, y, tokens) -> Tensor | None:
            if context.shape[1] != 1 or not all(map(self._has_step, tokens.samples)):
                return None
            groups = tokens.groups(self._group)  # held, for a step knows addresses alone
            found: Any = find_step(rows, weight, bias, groups, tokens.rows)
            place = None if found is None else context.room(layer_key, key, width, rows.dtype, rows.device)
            return None if place is None else found.attend(rows, y, *place)

        def add(y, rows, name, samples) -> Tensor:
            if not kept:
                new = rows.new_zeros(*context.shape, width, dtype=autocast_dtype(rows))
                kept.extend((new, context.past(layer_key, key, new)))
            sub = context.sequence.select(samples)
            past = None if kept[1] is None else kept[1].index_select(0, samples)[..., : 2 * self.r[name]]
            update, kv = self._attended(rows.index_select(0, samples), name, None, None, sub, past)
            kept[0][samples, :, : kv.shape[-1]] = kv
            return y.index_add(0, samples, update.to(y.dtype))

        y = mixed.combine(self.base_layer, rows, tokens, add, step if fusion.takes_steps(self.gci_impl, rows) else None)
        if kept:
            context.keep(layer_key, key, kept[0])
        return y.view(*x.shape[:-1], y.shape[-1])

    def _step(
        self, x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None, y: Tensor | None
    ) -> Tensor | None:
        context = sequence.required()
        if context.shape[1] != 1 or not self._has_step(name):
            return None
        group = self._group(name, context.shape[0])
        step: Any = find_step(x, weight, bias, (group,))
        kept = None
        if step is not None:
            kept = context.room(self.key_in(context.layer, context.run), name, 2 * self.r[name], x.dtype, x.device)
        if kept is None:
            return None
        return step.attend(x, y, *kept)

    def _group(self, name: str, count: int, first: int = 0) -> Group:
        A, qkv, B = (self.parameter(part, name) for part in self.adapter_layer_names)
        scaling = number(self.scaling[name])
        return Group(A, B, scaling, first, count, None, None, qkv, self.num_heads[name], self.residual[name])

    def settings_of(self, config: ALoRAConfig) -> dict[str, float]:
        return {name: getattr(config, name) for name in ("r", "num_heads", "lora_alpha", "residual")}

    def describe(self, name: str) -> str:
        return f"r={self.r[name]}, {self.num_heads[name]} heads" + (", residual" if self.residual[name] else "")


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


class ALoRAModel(BottleneckModel):
    """PEFT's tuner for GCI_ALORA. Made by get_peft_model, PeftModel.from_pretrained or gci_kernels.patch."""

    prefix = "gci_alora_"
    tuner_layer_cls = ALoRALinear
    default_targets = ("q_proj", "k_proj", "v_proj", "o_proj")

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """PEFT's, which learns of the decoder layers, and attaches the model to gci_kernels.generation.sequence."""
        # transformers makes a tuner for each adapter that it loads; all of a model's layers belong to the last.
        self.adapted = [module for module in model.modules() if isinstance(module, ALoRALinear)]
        self._inside: dict[nn.Module, tuple[int, ...]] = {}
        left_out: list[str] = []
        self._left_out = left_out
        for index, layer in enumerate(decoder_layers.find(model)[1]):
            for path, module in layer.named_modules():
                if not decoder_layers.CROSS_ATTENTION.search(path):
                    self._inside[module] = (*self._inside.get(module, ()), index)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._inside, self._left_out = {}, []
        if left_out:
            what = (
                f"ALoRA attends over the tokens of the decoder layers' own sequence, and leaves out {len(left_out)} "
                f"targeted layers outside of them or of a cross-attention: {_shortened(left_out)}"
            )
            if not any(adapter_name in layer.r for layer in self.adapted):
                raise ValueError(f"target_modules: {what}; nothing is left to adapt")
            warnings.warn(f"{what}. exclude_modules silences this", stacklevel=2)
        self.attached = sequence.attach(model, self.wanted)

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        """What lies outside of the decoder layers, as in a vision tower, or sees an encoder's sequence, is left out."""
        indices = self._inside.get(target)
        if indices is None:
            self._left_out.append(current_key)
            return
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key, parameter_name)
        if not isinstance(target, ALoRALinear):
            self.adapted[-1].decoder_layers = indices

    def _new_layer(self, target: nn.Module, name: str, config: ALoRAConfig, key: str) -> ALoRALinear:
        self.adapted.append(ALoRALinear(target, name, config, key))
        return self.adapted[-1]

    def wanted(self) -> Iterator[tuple[str, str]]:
        """(layer's key, adapter) of every past that the next forward asks for."""
        depth = self.attached.depth()
        for layer in self.adapted:
            if layer.disable_adapters:
                continue
            mix = mixed.current(layer)
            for index in layer.decoder_layers:
                if index >= depth:
                    continue
                if mix is None:
                    yield from ((layer.key_in(index), name) for name in layer.adapters())
                elif any(name in layer.r for name in mix.names):
                    yield layer.key_in(index), mixed_key(mix.names)

    def _detach(self) -> None:
        self.attached.detach()


register(ALoRAConfig, ALoRAModel)
