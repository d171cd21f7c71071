"""Tells layers deep inside a Hugging Face causal model what a sequence is, and where their adapters' past is kept.

A Linear inside a decoder layer sees neither the attention mask nor positions nor the cache. :func:`attach` gives two
kinds of modules a subclass of their own class:

- the backbone, the module that calls the decoder layers (LlamaModel, GPTNeoXModel, OPTDecoder ...): it reads the
  arguments of its forward, where the mask is still the user's, into a frame, and keeps that for the time of the call;
- each decoder layer: `__call__` hands it the frame as one more keyword argument, and its forward takes that out again
  and makes it what :func:`current` gives, until it returns or raises.

Why like this: gradient checkpointing runs a layer again in backward, long after the backbone has returned, and in
transformers 5 it replays the layer's forward and not its hooks. What it does replay, with use_reentrant True or False,
is the arguments. So the frame travels as one, is the same object in the replay, and nothing has to be remembered or
looked up. Checkpointing that replays `__call__` instead (torch's checkpoint_wrapper) loses the frame, and adapted
layers then raise. What is set during a call is thread-local, and each model's forward sets its own: models, nested
calls and threads don't mix.

torch.compile traces all of it. The graph breaks where a new cache is adopted (see adapter_cache), where the values of
cu_seq_lens_q are read, and where a 4-D mask is checked. A compiled forward with gradients that is given no cache keeps
nothing of its adapters, so a cache that it returns is refused later; without gradients it does, with a break.
Gradient checkpointing inside of one graph needs torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint, for
torch traces no change of Python's state there; what a layer sets is set back when it returns, so nothing is skipped.
"""

import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig

from gci_kernels.class_swap import Swapped, give_class, subclass
from gci_kernels.generation import direction, forward_context
from gci_kernels.generation.forward_context import Context, Frame, Wanted
from gci_kernels.models.decoder_layers import find as _find

_FRAME = "gci_frame"  # the decoder layers' additional argument


class _State:
    """What is set in one thread."""

    def __init__(self) -> None:
        self.frame: Frame | None = None
        self.context: Context | None = None
        # What generate() made of a 2-D mask for a model that has windows in every layer, and the mask: from what was
        # made, no one can tell which tokens before the window are padding.
        self.padding: tuple[object, Tensor | None] | None = None


class _Thread(threading.local):
    """One state for each thread. torch.compile traces no ContextVar, and where a graph breaks it loses what was set on
    a threading.local; so that is only read, and its state is an object of its own."""

    def __init__(self) -> None:
        self.state = _State()


_thread = _Thread()


def current() -> Context | None:
    """The context of the decoder layer that runs now in this thread; None outside of one."""
    return _thread.state.context


def required() -> Context:
    """:func:`current`, for a layer that cannot do without.

    Raises:
        RuntimeError: no decoder layer of an attached model runs now, or one runs outside of its model's forward.
    """
    context = _thread.state.context
    if context is None:
        raise RuntimeError(
            "this layer needs to know the sequences of the batch: it must lie in a decoder layer of a model given to "
            "gci_kernels.generation.sequence.attach, and run inside of that model's forward; for gradient "
            "checkpointing use model.gradient_checkpointing_enable()"
        )
    return context


class _Backbone(Swapped):
    """Mixin for the class of the module that calls the decoder layers."""

    def forward(self, base_forward: Callable, *args, **kwargs):
        state = _thread.state
        arguments = {**dict(zip(self.gci_arguments, args, strict=False)), **kwargs}
        if state.padding is not None and state.padding[0] is arguments.get("attention_mask"):
            arguments["attention_mask"] = state.padding[1]
            state.padding = None
        given = forward_context.read(arguments, self.gci_wanted, self.gci_codebooks, _packs(self, arguments))
        if given is not None:
            look_ahead = arguments.get("is_causal") is False
            reason = direction.ARGUMENT if look_ahead else direction.obstacle(self, self.gci_attentions)
            if reason is not None:
                raise ValueError(reason)
        before, state.frame = state.frame, given
        try:
            return base_forward(self, *args, **kwargs)
        finally:
            state.frame = before


def _packs(backbone: nn.Module, given: dict) -> bool:
    """Whether position_ids that start again are packed sequences to the model: beside a cache they are not.

    transformers' masks are made so; its flash attention looks at the positions alone.
    """
    config: Any = backbone.config
    if "flash" in (getattr(config, "_attn_implementation", None) or ""):
        return True
    if given.get("past_key_values") is not None:
        return False
    caches = given.get("use_cache")
    caches = getattr(config, "use_cache", False) if caches is None else caches
    return not caches or (backbone.training and getattr(backbone, "gradient_checkpointing", False))


class _Layer(Swapped):
    """Mixin for the class of the decoder layers."""

    def __call__(self, *args, **kwargs):
        if (given := _thread.state.frame) is not None:
            kwargs.setdefault(_FRAME, given)
        return super().__call__(*args, **kwargs)

    def forward(self, base_forward: Callable, *args, **kwargs):
        given = kwargs.pop(_FRAME, None)
        context = None if given is None else given.context(self, args, kwargs)
        state = _thread.state
        before, state.context = state.context, context
        try:
            return base_forward(self, *args, **kwargs)
        finally:
            state.context = before


class _Generating(Swapped):
    """Mixin for the class of the model whose generate() is called."""

    wrapped = ("prepare_inputs_for_generation",)

    def prepare_inputs_for_generation(self, base_method: Callable, *args, **kwargs):
        inputs = base_method(self, *args, **kwargs)
        given, made = kwargs.get("attention_mask"), inputs.get("attention_mask")
        plain = given is None or (isinstance(given, Tensor) and given.dim() == 2)
        _thread.state.padding = (made, given) if plain and made is not given and not _sees_all(self.config) else None
        return inputs

    def init_continuous_batching(self, *args, **kwargs):
        if self.gci_wanted is None or any(True for _ in self.gci_wanted()):
            raise TypeError(
                "continuous batching (generate_batch) keeps the past of its requests in a PagedAttentionCache, beside "
                "which ALoRA cannot keep its own; use generate() with a padded batch, or disable the adapter"
            )
        return super().init_continuous_batching(*args, **kwargs)


def _sees_all(config: PretrainedConfig) -> bool:
    """Whether any layer attends to all earlier tokens, so that generate() makes a mask of all of them."""
    config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return "full_attention" in kinds
    return getattr(config, "sliding_window", None) is None and getattr(config, "attention_chunk_size", None) is None


class Handle:
    """The way back from :func:`attach`, and what it found."""

    def __init__(self, model: nn.Module, backbone: nn.Module, layers: Sequence[nn.Module]) -> None:
        self._model, self._backbone, self.layers = model, backbone, layers

    def depth(self) -> int:
        """How many decoder layers run: all, or, in assisted decoding by an early exit, the config's number of them."""
        return getattr(self._backbone.config, "num_hidden_layers", len(self.layers))

    def detach(self) -> None:
        """Gives every module its own class back; nothing of :func:`attach` stays. Twice does the same as once.

        Raises:
            RuntimeError: a module's class has been changed since (FSDP does that); nothing is detached then.
        """
        every = dict.fromkeys((*self.layers, self._backbone, self._model))
        modules = [module for module in every if isinstance(module, _MIXINS)]
        for module in modules:
            if "_gci_parts" not in vars(type(module)):
                raise RuntimeError(f"cannot detach: {type(module).__name__} has been given another class since")
        for module in modules:
            give_class(module, type(module)._gci_parts[0])
        for module in every:
            for name in _ATTRIBUTES:
                vars(module).pop(name, None)


_MIXINS = (_Layer, _Backbone, _Generating)
_ATTRIBUTES = ("gci_arguments", "gci_attentions", "gci_codebooks", "gci_layer", "gci_wanted")


def attach(model: nn.Module, wanted: Wanted | None = None) -> Handle:
    """Makes :func:`current` answer inside of the decoder layers of `model`. Attaching again changes only `wanted`.

    Args:
        model: a decoder-only model from transformers, or a PeftModel around one.
        wanted: gives (layer_key, adapter) for each call of :meth:`Context.update` that the next forward will make.
            With it a cache that does not fit is refused before the model writes to it, and a forward for which it gives
            nothing is the model's own; without, the layer that finds no past raises, and layers before it have been
            written. A bound method, so that copies of the model follow.

    Raises:
        TypeError: not a model from transformers.
        ValueError: its decoder layers cannot be found or hooked, or it attends in both directions. The model is then as
            it was.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    backbone, layers = _find(model)
    attentions = direction.self_attentions(layers)
    if (reason := direction.obstacle(backbone, attentions)) is not None:
        raise ValueError(reason)
    for module in (backbone, *layers):
        forward = vars(module).get("_old_forward", vars(module).get("forward"))  # accelerate's hooks keep the first
        if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
            raise ValueError(f"cannot attach: the forward of a {type(module).__name__} is replaced on the instance")
    if not isinstance(backbone, _Backbone):
        give_class(backbone, subclass(type(backbone), _Backbone))
        backbone.gci_arguments = _positional(type(backbone)._gci_parts[0].forward)
    embedding = getattr(backbone, "embed_tokens", None)
    backbone.gci_codebooks = len(embedding) if isinstance(embedding, nn.ModuleList) else 1
    backbone.gci_wanted, backbone.gci_attentions = wanted, attentions
    for number, layer in enumerate(layers):
        if not isinstance(layer, _Layer):
            give_class(layer, subclass(type(layer), _Layer))
        names = _positional(type(layer)._gci_parts[0].forward)
        layer.gci_layer = number, tuple(i for i, name in enumerate(names) if direction.is_self_mask(name))
    if model is not backbone and isinstance(model, GenerationMixin):
        if not isinstance(model, _Generating):
            give_class(model, subclass(type(model), _Generating))
        model.gci_wanted = wanted
    return Handle(model, backbone, layers)


def _positional(forward: Callable) -> tuple[str, ...]:
    """The names of the arguments that `forward` takes by position, self left out."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(forward).parameters.items() if p.kind in kinds)[1:]
