"""ALoRA (arXiv 2405.17830) as the PEFT method GCI_ALORA."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gci_kernels.generation import sequence
from gci_kernels.generation.forward_context import LayerContext
from gci_kernels.limits import MAX_DECODE_TOKENS
from gci_kernels.models import decoder_layers
from gci_kernels.ops.arguments import autocast_dtype
from gci_kernels.ops.attention.api import check_heads
from gci_kernels.ops.bottleneck import adapted_linear
from gci_kernels.ops.bottleneck.mixers import ATTENTION
from gci_kernels.ops.bottleneck.shared_input import Arguments
from gci_kernels.ops.decode import find_step, has_kernels
from gci_kernels.tuners import fusion, mixed
from gci_kernels.tuners.base import check_integer, uniform, zeros_or_uniform
from gci_kernels.tuners.bottleneck import BottleneckConfig, BottleneckLayer, BottleneckModel
from gci_kernels.tuners.methods import Method
from gci_kernels.tuners.registration import classes_of, register
from gci_kernels.tuners.shared_input import share


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

    method: ClassVar[str] = "ALoRA"

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


def _parameters(config: ALoRAConfig, in_features: int, out_features: int) -> dict[str, Tensor]:
    """A [r, in], B [out, r] and qkv [3r, r]: q and k Xavier, v the identity."""
    r = config.r
    A, q, k = uniform(r, in_features), *(nn.init.xavier_uniform_(torch.empty(r, r)) for _ in range(2))
    B = zeros_or_uniform(config.init_weights, out_features, r)
    return {"A": A, "B": B, "qkv": torch.cat((q, k, torch.eye(r)))}


class _Layer(BottleneckLayer):
    """A linear layer with ALoRA adapters; its forward is :func:`gci_kernels.ops.alora_linear`.

    Under each adapter's name: A [r, in], qkv [3r, r] and B [out, r]. What the sequence is, and the k and v of past
    tokens in generation, it learns from gci_kernels.generation; outside of its model's forward it raises.
    """

    decoder_layers: tuple[int, ...] = ()  # the numbers of those that it lies in, several where it is shared

    def key_in(self, decoder_layer: int, run: int) -> str:
        """Under which the cache keeps what this layer makes when `decoder_layer` runs, for the first time or again."""
        key = self.key if len(self.decoder_layers) < 2 else f"{self.key} of decoder layer {decoder_layer}"
        return f"{key}, run {run}" if run else key

    def _rows(self, x: Tensor, context: LayerContext) -> Tensor:
        """x as [batch, time, in]; some models give their inner layers [batch * time, in]."""
        leading = x.shape[:-1]
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
        rows = x if x.shape[:-1] == context.shape else self._rows(x, context)
        if not context.caches:
            arguments = self._arguments(rows, name, weight, bias, context.sequence.segments)
            y, _ = adapted_linear(*arguments, share, self)
        else:
            key = self.key_in(context.layer, context.run)
            kept = rows.new_empty(rows.shape[0], 0, 2 * self.r[name], dtype=autocast_dtype(rows))
            past = context.past(key, name, kept)
            arguments = self._arguments(rows, name, weight, bias, context.sequence.segments, past)
            y, kv = adapted_linear(*arguments)
            context.keep(key, name, kv)
        return y if rows is x else y.view(*x.shape[:-1], y.shape[-1])

    def shared_arguments(self, x: Tensor) -> Arguments | None:
        """Those of a forward that keeps nothing for a cache."""
        context, found = sequence.current(), super().shared_arguments(x)
        if found is None or context is None or context.caches or x.shape[:-1] != context.shape:
            return None
        return (*found[0][:6], context.sequence.segments, None, None), *found[1:]

    def _mixed(self, x: Tensor, mix: mixed.MixedBatch) -> Tensor:
        """Keys and values of all adapters share one entry of the cache, as wide as the widest of them."""
        context, key = sequence.required(), mixed_key(mix.names)
        rows, layer_key = self._rows(x, context), self.key_in(context.layer, context.run)
        mix.check(rows, self)
        tokens = mixed.Tokens(rows, mix.expanded(rows.shape[0]), self.r)
        width = max((2 * self.r[name] for name in tokens.samples), default=0)
        kept: list[Any] = []

        def step(
            rows: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None, tokens: mixed.Tokens
        ) -> Tensor | None:
            groups = tokens.groups(self._group)  # held, for a step knows addresses alone
            if context.shape[1] != 1 or groups is None:
                return None
            found: Any = find_step(rows, weight, bias, groups, tokens.rows)
            reserved = None if found is None else context.reserve(layer_key, key, width, rows.dtype, rows.device)
            return None if reserved is None else found.attend(rows, y, *reserved)

        def add(y: Tensor, rows: Tensor, name: str, samples: Tensor) -> Tensor:
            if not kept:
                new = rows.new_zeros(*context.shape, width, dtype=autocast_dtype(rows))
                kept.extend((new, context.past(layer_key, key, new)))
            sub = context.sequence.select(samples)
            past = None if kept[1] is None else kept[1].index_select(0, samples)[..., : 2 * self.r[name]]
            own = rows.index_select(0, samples)
            update, kv = adapted_linear(*self._arguments(own, name, None, None, sub.segments, past))
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
        group = self._group(name, context.shape[0])
        if context.shape[1] != 1 or group is None:
            return None
        step: Any = find_step(x, weight, bias, (group,))
        kept = None
        if step is not None:
            simple = not context.run and len(self.decoder_layers) < 2
            key = self.key if simple else self.key_in(context.layer, context.run)
            kept = context.reserve(key, name, 2 * self.r[name], x.dtype, x.device)
        if kept is None:
            return None
        return step.attend(x, y, *kept)


def may_replay(batch: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels take a step of one token for each of `batch` sequences, and read the past's length on `device`.

    Args:
        batch: the number of sequences.
        dtype: of the layers' input and of the keys and values that they store.
        device: of the layers; on a GPU the first call may check the kernels there.
    """
    if batch > MAX_DECODE_TOKENS or torch.is_autocast_enabled(device.type):
        return False
    return has_kernels(dtype, device.type, attends=True, device=device)


class _Model(BottleneckModel):
    """PEFT's tuner for GCI_ALORA. Made by get_peft_model, PeftModel.from_pretrained or gci_kernels.patch."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, which learns of the decoder layers, and attaches the model to gci_kernels.generation.sequence."""
        # transformers makes a tuner for each adapter that it loads; all of a model's layers belong to the last.
        self.adapted = [module for module in model.modules() if isinstance(module, ALoRALinear)]
        self._inside: dict[nn.Module, tuple[int, ...]] = {}
        self._left_out: list[str] = []
        for index, layer in enumerate(decoder_layers.find(model)[1]):
            for path, module in layer.named_modules():
                if not decoder_layers.CROSS_ATTENTION.search(path):
                    self._inside[module] = (*self._inside.get(module, ()), index)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._inside = {}
        if left_out := self._left_out:
            what = (
                f"ALoRA attends over the tokens of the decoder layers' own sequence, and leaves out {len(left_out)} "
                "targeted layers outside of them or of a cross-attention: "
                f"{', '.join(left_out[:3])}{', ...' if len(left_out) > 3 else ''}"
            )
            if not any(adapter_name in layer.r for layer in self.adapted):
                raise ValueError(f"target_modules: {what}; nothing is left to adapt")
            warnings.warn(f"{what}. exclude_modules silences this", stacklevel=2)
        self.attached = sequence.attach(model, self.expected_entries, may_replay)

    def _create_and_replace(self, peft_config: Any, adapter_name: str, target: Any, *args: Any, **kwargs: Any) -> None:
        """What lies outside of the decoder layers, as in a vision tower, or sees an encoder's sequence, is left out."""
        if target in self._inside:
            super()._create_and_replace(peft_config, adapter_name, target, *args, **kwargs)
        else:
            self._left_out.append(kwargs["current_key"])

    def _new_layer(self, target: nn.Module, name: str, config: ALoRAConfig, key: str) -> BottleneckLayer:
        layer = ALoRALinear(target, name)
        layer.decoder_layers = self._inside[target]
        self.adapted.append(layer)
        return layer

    def expected_entries(self) -> Iterator[tuple[str, str]]:
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
                    yield from ((layer.key_in(index, 0), name) for name in layer.adapters())
                elif any(name in layer.r for name in mix.names):
                    yield layer.key_in(index, 0), mixed_key(mix.names)

    def _detach(self) -> None:
        self.attached.detach()


def _describe(config: ALoRAConfig) -> str:
    return f"r={config.r}, {config.num_heads} heads" + (", residual" if config.residual else "")


ALORA = register(
    Method(
        ALoRAConfig,
        ATTENTION,
        _parameters,
        _describe,
        example=ALoRAConfig(r=8, num_heads=2, init_weights=False),
        settings=lambda config: (config.num_heads, int(config.residual)),
        saved=("r", "num_heads", "lora_alpha", "residual"),
        B="B",
        prefix="gci_alora_",
        depends_on="the other tokens",
    ),
    _Layer,
    _Model,
)
ALoRALinear, ALoRAModel = classes_of(ALORA)
