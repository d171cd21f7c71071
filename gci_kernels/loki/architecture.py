"""Where a Hugging Face causal model can be taken hold of: its decoder layers, their last projections, their caches."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from gci_kernels.models import decoder_layers

#: What the MLP's last projection is called in the models of transformers; the first that a layer has is taken.
PROJECTIONS = ("down_proj", "dense_4h_to_h", "fc2", "c_proj", "fc_out")
# What computes attention from an explicit mask, which rows that share one sequence's keys need.
ATTENTIONS = ("sdpa", "eager")
# Layers whose past is nothing but keys and values.
LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


class Stop(Exception):
    """Ends a model's forward whose rest would be computed for nothing."""


@dataclass(frozen=True)
class Architecture:
    """A causal model, its decoder layers, and the projection that each of them ends in."""

    model: nn.Module
    layers: tuple[nn.Module, ...]
    projections: tuple[nn.Module, ...]

    @classmethod
    def of(cls, model: nn.Module, projection: str | None = None) -> "Architecture":
        """Find the parts of a transformers model, or of a PeftModel around one.

        Args:
            projection: the projection's name within a layer; None: the first of :data:`PROJECTIONS` that it has.

        Raises:
            ValueError: no list of decoder layers, a layer without exactly one such projection (a mixture of experts
                has several or none), layers without attention, or an attention that takes no explicit mask.
        """
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = model.config.get_text_config()
        if config._attn_implementation not in ATTENTIONS:
            raise ValueError(
                f"attribution needs attn_implementation {' or '.join(map(repr, ATTENTIONS))}, the model has "
                f"{config._attn_implementation!r}: call model.set_attn_implementation('sdpa') first"
            )
        other = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
        if other:
            raise ValueError(f"attribution can't walk layers of type {', '.join(sorted(other))}")
        _, layers = decoder_layers.find(model)
        found = tuple(_projection(layer, number, projection) for number, layer in enumerate(layers))
        return cls(model, layers, found)

    @property
    def last(self) -> int:
        return len(self.layers) - 1

    def run(self, **inputs: object) -> object:
        """The model's forward on the inputs that it knows; None where a hook or a cache has stopped it."""
        known = inspect.signature(self.model.forward).parameters
        try:
            return self.model(**{name: value for name, value in inputs.items() if name in known})
        except Stop:
            return None


def _projection(layer: nn.Module, number: int, wanted: str | None) -> nn.Module:
    for name in (wanted,) if wanted else PROJECTIONS:
        found = [
            module
            for path, module in layer.named_modules()
            if path.rpartition(".")[2] == name and "attn" not in path and "attention" not in path
        ]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"decoder layer {number} has {len(found)} modules {name}: it must end in one of them")
    tried = wanted or ", ".join(PROJECTIONS)
    raise ValueError(f"decoder layer {number} ({type(layer).__name__}) has none of these projections: {tried}")


class Collector(Cache):
    """Hands each layer its own keys and values back and keeps them; ends the pass at layer `last`, where it is given.

    Of the last layer, no position but the final one is ever needed beyond its key and value.
    """

    def __init__(self, last: int | None = None):
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.last = last
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        self.kept[layer_idx] = (key_states, value_states)
        if layer_idx == self.last:
            raise Stop
        return key_states, value_states


class PrefixLayer(DynamicLayer):
    """The keys and values [batch, heads, positions, size] of all positions but the final one; it never grows."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return torch.cat((self.keys, key_states), dim=-2), torch.cat((self.values, value_states), dim=-2)


class WholeLayer(PrefixLayer):
    """Keys and values [batch, heads, T, size] of all positions, into which the decoding step writes the final one's.

    Beside many prefixes of their own, a copy with one more position would cost more than the step's attention.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__(keys[:, :, :-1], values[:, :, :-1])
        self.whole = (keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return tuple(_WriteLast.apply(*pair) for pair in zip(self.whole, (key_states, value_states), strict=True))


class _WriteLast(torch.autograd.Function):
    """`last` [batch, heads, 1, size] written over the last position of `whole` [batch, heads, T, size], a constant.

    Autograd's own rule for such an assignment copies the whole gradient to hand on a part of it.
    """

    @staticmethod
    def forward(ctx, whole: Tensor, last: Tensor) -> Tensor:
        ctx.mark_dirty(whole)
        whole[:, :, -1:] = last
        return whole

    @staticmethod
    def backward(ctx, dwhole: Tensor) -> tuple[None, Tensor]:
        return None, dwhole[:, :, -1:]


def hidden_and_kwargs(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, dict]:
    """A layer's hidden states, and everything else it is called with, by name."""
    names = list(inspect.signature(layer.forward).parameters)
    kwargs = dict(zip(names, args, strict=False)) | kwargs
    if kwargs.get("alibi") is not None:
        raise ValueError("attribution can't walk a model whose attention depends on distances by ALiBi")
    return kwargs.pop("hidden_states"), kwargs


def replaced(output: Tensor | tuple, hidden: Tensor) -> Tensor | tuple:
    """A layer's output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def hidden_of(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def hooks(
    arch: Architecture,
    *,
    before: Callable[[int, Tensor, dict], tuple[Tensor, dict] | None] | None = None,
    projected: Callable[[int, Tensor], Tensor | None] | None = None,
    after: Callable[[int, Tensor], Tensor | None] | None = None,
) -> Iterator[None]:
    """Call `before` each decoder layer, where its projection has `projected`, and `after` it; each may replace."""
    handles = []

    def watch(number: int, layer: nn.Module, projection: nn.Module) -> None:
        def enter(module: nn.Module, args: tuple, kwargs: dict):
            changed = before(number, *hidden_and_kwargs(module, args, kwargs))
            return changed and ((changed[0],), changed[1])

        def leave(_: nn.Module, args: tuple, output: Tensor | tuple):
            changed = after(number, hidden_of(output))
            return None if changed is None else replaced(output, changed)

        if before:
            handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        if projected:
            handles.append(projection.register_forward_hook(lambda _, args, output: projected(number, output)))
        if after:
            handles.append(layer.register_forward_hook(leave))

    try:
        for number, (layer, projection) in enumerate(zip(arch.layers, arch.projections, strict=True)):
            watch(number, layer, projection)
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and in its own dtype, no parameter asking for a gradient; afterwards as it was."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        model.eval()
        # A caller's no_grad or inference mode would leave nothing to differentiate; autocast ends where a thread does.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
