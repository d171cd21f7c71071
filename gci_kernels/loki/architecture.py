"""Hooks into a Hugging Face causal model: around its decoder layers, at their last projections, and in its cache."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from gci_kernels.models import decoder_layers, model_state

#: Names of an MLP's last projection in the models of transformers; the first that a layer has is taken.
PROJECTIONS = ("down_proj", "dense_4h_to_h", "fc2", "c_proj", "fc_out")
# Implementations of attention that take an explicit mask; streams that share one sequence's keys need one.
ATTENTIONS = ("sdpa", "eager")
# Layers that cache nothing but keys and values.
LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}

BeforeLayer = Callable[[int, Tensor, dict[str, Any]], tuple[Tensor, dict[str, Any]] | None]
OutputHook = Callable[[int, Tensor], Tensor | None]


class StopForward(Exception):
    """Ends a model's forward early where the rest of it is not needed."""


@dataclass(frozen=True)
class Architecture:
    """A causal model, its decoder layers, and the last projection of each."""

    model: PreTrainedModel
    layers: tuple[nn.Module, ...]
    projections: tuple[nn.Module, ...]

    @classmethod
    def of(cls, model: nn.Module, projection: str | None = None) -> "Architecture":
        """Find the parts of a transformers model, or of a PeftModel around one.

        Args:
            model: a causal language model.
            projection: the projection's name within a layer; None: the first of :data:`PROJECTIONS` that it has.

        Raises:
            TypeError: not a model from transformers.
            ValueError: no list of decoder layers, a layer without exactly one such projection (a mixture of experts
                has several or none), layers without attention, or an attention that takes no explicit mask.
        """
        base = model_state.base_model(model)
        config = base.config.get_text_config()
        if config._attn_implementation not in ATTENTIONS:
            raise ValueError(
                f"attribution needs attn_implementation {' or '.join(map(repr, ATTENTIONS))}, the model has "
                f"{config._attn_implementation!r}: call model.set_attn_implementation('sdpa') first"
            )
        other = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
        if other:
            raise ValueError(f"attribution does not support layers of type {', '.join(sorted(other))}")
        _, layers = decoder_layers.find(base)
        found = tuple(_projection(layer, number, projection) for number, layer in enumerate(layers))
        return cls(base, layers, found)

    @property
    def last(self) -> int:
        """The number of the last layer."""
        return len(self.layers) - 1

    def run(self, **inputs: object) -> Any:
        """The model's output for those inputs that its forward takes; None where a hook or a cache has stopped it."""
        known = inspect.signature(self.model.forward).parameters
        try:
            return self.model(**{name: value for name, value in inputs.items() if name in known})
        except StopForward:
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


class CollectingCache(Cache):
    """Records each layer's keys and values and returns them unchanged, as an empty cache would.

    With `last`, the forward stops in that layer: of the last layer only the final position is needed beyond its key
    and value, and the decoding step computes that.
    """

    def __init__(self, last: int | None = None) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.last = last
        self.collected: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Records `key_states` and `value_states` [batch, heads, positions, size] and returns them."""
        self.collected[layer_idx] = (key_states, value_states)
        if layer_idx == self.last:
            raise StopForward
        return key_states, value_states


class PrefixLayer(DynamicLayer):
    """The keys and values [batch, heads, positions, size] of all positions but the final one; it never grows."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The prefix with the step's keys and values [batch, heads, streams, size] after it."""
        return torch.cat((self.keys, key_states), dim=-2), torch.cat((self.values, value_states), dim=-2)


class FullLengthLayer(PrefixLayer):
    """Keys and values [batch, heads, T, size] of all positions; the decoding step writes those of the final one.

    Where each row has a prefix of its own, a copy with one more position would cost more than the step's attention.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__(keys[:, :, :-1], values[:, :, :-1])
        self.full = (keys, values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """All positions, the final one's keys and values [batch, heads, 1, size] written in place."""
        keys, values = self.full
        return _WriteLast.apply(keys, key_states), _WriteLast.apply(values, value_states)


class _WriteLast(torch.autograd.Function):
    """`last` [batch, heads, 1, size] written over the last position of `full` [batch, heads, T, size], a constant.

    Autograd's own rule for such an assignment copies the whole gradient to pass on a part of it.
    """

    @staticmethod
    def forward(ctx: Any, full: Tensor, last: Tensor) -> Tensor:
        ctx.mark_dirty(full)
        full[:, :, -1:] = last
        return full

    @staticmethod
    def backward(ctx: Any, dfull: Tensor) -> tuple[None, Tensor]:
        return None, dfull[:, :, -1:]


def hidden_of(output: Tensor | tuple) -> Tensor:
    """The hidden states in a layer's output, which may be a tuple that begins with them."""
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def hooks(
    arch: Architecture,
    *,
    before: BeforeLayer | None = None,
    projected: OutputHook | None = None,
    after: OutputHook | None = None,
) -> Iterator[None]:
    """Calls functions while the model runs; what one returns, other than None, replaces what it was given.

    Args:
        arch: the model.
        before: called before each layer with its number, its hidden states and its other arguments.
        projected: called after each layer's last projection with the layer's number and the projection's output.
        after: called after each layer with its number and the hidden states that it returns.
    """
    with contextlib.ExitStack() as stack:
        for number, (layer, projection) in enumerate(zip(arch.layers, arch.projections, strict=True)):
            if before:
                hook = partial(_before_layer, before, number)
                stack.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
            for module, function in ((projection, projected), (layer, after)):
                if function:
                    stack.enter_context(module.register_forward_hook(partial(_with_output, function, number)))
        yield


def _before_layer(
    before: BeforeLayer, number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """A forward pre-hook that passes `before` all arguments but the hidden states by name.

    Raises:
        ValueError: the layer gets ALiBi's distances, which streams in one sequence cannot have.
    """
    kwargs = dict(zip(inspect.signature(layer.forward).parameters, args, strict=False)) | kwargs
    if kwargs.get("alibi") is not None:
        raise ValueError("attribution does not support ALiBi, an attention that depends on distances in the sequence")
    changed = before(number, kwargs.pop("hidden_states"), kwargs)
    return None if changed is None else ((changed[0],), changed[1])


def _with_output(
    function: OutputHook, number: int, _: nn.Module, args: tuple, output: Tensor | tuple
) -> Tensor | tuple | None:
    """A forward hook that passes `function` the hidden states alone."""
    changed = function(number, hidden_of(output))
    return (changed, *output[1:]) if changed is not None and isinstance(output, tuple) else changed


@contextlib.contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode, without autocast, no parameter requiring a gradient; all as before afterwards."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        model.eval()
        # A caller's no_grad or inference mode would leave nothing to differentiate; autocast is per thread, and parts
        # of the work run in threads of their own.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
