"""Tells layers deep inside a Hugging Face causal model what a sequence is, and where their adapters' past is stored.

A Linear inside a decoder layer sees neither the attention mask nor positions nor the cache. :func:`attach` gives two
kinds of modules a subclass of their own class:

- the backbone, the module that calls the decoder layers (LlamaModel, GPTNeoXModel, OPTDecoder ...): it reads the
  arguments of its forward, where the mask is still the user's, into a ForwardContext for the time of the call;
- each decoder layer: `__call__` passes the ForwardContext as one more keyword argument, and its forward takes that out
  again and makes of it the LayerContext that :func:`current` returns, until the forward returns or raises.

The reason for the argument: gradient checkpointing runs a layer again in backward, long after the backbone has
returned, and in transformers 5 it replays the layer's forward without its hooks. With use_reentrant True or False it
replays the same arguments, so the replay gets the same ForwardContext, and no table of them is needed. Checkpointing
that replays `__call__` instead (torch's checkpoint_wrapper) loses it, and adapted layers then raise. What is set during
a call is thread-local, and each model's forward sets its own: models, nested calls and threads do not mix.

torch.compile traces all of it. The graph breaks where a new cache gets the adapters' beside it (see model_cache),
and, on a CPU, where the values of cu_seq_lens_q are read and where a 4-D mask is checked. A compiled forward with
gradients that is given no cache stores nothing of its adapters, so a cache that it returns is refused later; without
gradients it does, with a break. Gradient checkpointing inside of one graph needs
torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint, for torch traces no change of Python's state there;
a layer restores what it sets when it returns, so nothing is skipped.
"""

import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

from gci_kernels.class_swap import Swapped, add_mixin, remove_mixin
from gci_kernels.generation import direction, forward_context
from gci_kernels.generation.forward_arguments import takes_packed_positions
from gci_kernels.generation.forward_context import ExpectedEntries, ForwardContext, LayerContext, LayerInfo, MayReplay
from gci_kernels.models import decoder_layers

_ARGUMENT = "gci_forward_context"  # the decoder layers' additional argument


class _State:
    """What is set in one thread."""

    def __init__(self) -> None:
        self.forward_context: ForwardContext | None = None
        self.layer_context: LayerContext | None = None
        # For a model with a window in every layer: the mask that generate() made of the user's, and the user's. Of the
        # tokens before the window the former does not say which are padding.
        self.masks: tuple[object, Tensor | None] | None = None


class _Thread(threading.local):
    """One state for each thread. torch.compile traces no ContextVar, and where a graph breaks it loses what was set on
    a threading.local; so that is only read, and its state is an object of its own."""

    def __init__(self) -> None:
        self.state = _State()


_thread = _Thread()


def current() -> LayerContext | None:
    """The context of the decoder layer that runs now in this thread; None outside of one."""
    return _thread.state.layer_context


def required() -> LayerContext:
    """:func:`current`, for a layer that cannot do without.

    Raises:
        RuntimeError: no decoder layer of an attached model runs now, or one runs outside of its model's forward.
    """
    context = _thread.state.layer_context
    if context is None:
        raise RuntimeError(
            "this layer needs to know the sequences of the batch: it must lie in a decoder layer of a model given to "
            "gci_kernels.generation.sequence.attach, and run inside of that model's forward; for gradient "
            "checkpointing use model.gradient_checkpointing_enable()"
        )
    return context


class _BackboneInfo(NamedTuple):
    """What a backbone needs to know to read the arguments of its forward.

    Attributes:
        arguments: the names of those that the forward takes by position.
        attentions: as direction.self_attentions gives them.
        codebooks: how many rows of input_ids make up one row of the batch.
        expected_entries, may_replay: as in :func:`attach`.
    """

    arguments: tuple[str, ...]
    attentions: tuple[tuple[nn.Module, str], ...]
    codebooks: int
    expected_entries: ExpectedEntries | None
    may_replay: MayReplay | None


class _Backbone(Swapped):
    """Mixin for the class of the module that calls the decoder layers."""

    own = ("gci_backbone",)
    gci_backbone: _BackboneInfo

    def forward(self, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state, info = _thread.state, self.gci_backbone
        arguments = {**dict(zip(info.arguments, args, strict=False)), **kwargs}
        if state.masks is not None and state.masks[0] is arguments.get("attention_mask"):
            arguments["attention_mask"] = state.masks[1]
            state.masks = None
        packs = takes_packed_positions(self, arguments)
        context = forward_context.read(
            arguments, info.expected_entries, info.may_replay, codebooks=info.codebooks, packs=packs
        )
        if context is not None:
            non_causal = arguments.get("is_causal") is False
            reason = direction.ARGUMENT if non_causal else direction.obstacle(self, info.attentions)
            if reason is not None:
                raise ValueError(reason)
        before, state.forward_context = state.forward_context, context
        try:
            return base_forward(self, *args, **kwargs)
        finally:
            state.forward_context = before


class _Layer(Swapped):
    """Mixin for the class of the decoder layers."""

    own = ("gci_layer",)
    gci_layer: LayerInfo

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (context := _thread.state.forward_context) is not None:
            kwargs.setdefault(_ARGUMENT, context)
        return super().__call__(*args, **kwargs)

    def forward(self, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop(_ARGUMENT, None)
        context = None if given is None else given.layer_context(self.gci_layer, args, kwargs)
        state = _thread.state
        before, state.layer_context = state.layer_context, context
        try:
            return base_forward(self, *args, **kwargs)
        finally:
            state.layer_context = before


class _Generating(Swapped):
    """Mixin for the class of the model whose generate() is called."""

    wrapped = ("prepare_inputs_for_generation",)
    own = ("gci_expected_entries",)
    config: PretrainedConfig
    gci_expected_entries: ExpectedEntries | None

    def prepare_inputs_for_generation(
        self, base_method: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        inputs = base_method(self, *args, **kwargs)
        given, made = kwargs.get("attention_mask"), inputs.get("attention_mask")
        plain = given is None or (isinstance(given, Tensor) and given.dim() == 2)
        windows = plain and made is not given and not _has_full_attention(self.config)
        _thread.state.masks = (made, given) if windows else None
        return inputs

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        if self.gci_expected_entries is None or any(True for _ in self.gci_expected_entries()):
            raise TypeError(
                "continuous batching (generate_batch) keeps the past of its requests in a PagedAttentionCache, beside "
                "which ALoRA cannot keep its own; use generate() with a padded batch, or disable the adapter"
            )
        return super().init_continuous_batching(*args, **kwargs)


def _has_full_attention(config: PretrainedConfig) -> bool:
    """Whether any layer attends to all earlier tokens, so that generate() makes a mask of all of them."""
    config = config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None)
    if types is not None:
        return "full_attention" in types
    return getattr(config, "sliding_window", None) is None and getattr(config, "attention_chunk_size", None) is None


class Handle:
    """Undoes :func:`attach`, and says what it found.

    Attributes:
        layers: the decoder layers, in order.
    """

    def __init__(self, model: nn.Module, backbone: PreTrainedModel, layers: Sequence[nn.Module]) -> None:
        self._model, self._backbone, self.layers = model, backbone, layers

    def depth(self) -> int:
        """How many decoder layers run: all, or, in assisted decoding by an early exit, the config's number of them."""
        return getattr(self._backbone.config, "num_hidden_layers", len(self.layers))

    def detach(self) -> None:
        """Gives every module its own class back; nothing of :func:`attach` stays. A second call changes nothing.

        Raises:
            RuntimeError: a module's class has been changed since (FSDP does that); nothing is detached then.
        """
        every = dict.fromkeys((*self.layers, self._backbone, self._model))
        attached = [each for each in every if isinstance(each, (_Layer, _Backbone, _Generating))]
        for each in attached:
            if "_gci_parts" not in vars(type(each)):
                raise RuntimeError(f"cannot detach: {type(each).__name__} has been given another class since")
        for each in attached:
            remove_mixin(each)


def attach(
    model: nn.Module, expected_entries: ExpectedEntries | None = None, may_replay: MayReplay | None = None
) -> Handle:
    """Makes :func:`current` work inside of the decoder layers of `model`.

    A second call for the same model changes `expected_entries` and `may_replay` alone.

    Args:
        model: a decoder-only model from transformers, or a PeftModel around one.
        expected_entries: gives (layer_key, adapter) for each past that the layers will ask the next forward's context
            for. With it a cache that does not fit is refused before the model writes to it, and a forward for which it
            gives nothing is the model's own; without, the layer that finds no past raises, after layers before it have
            been written. A bound method, so that copies of the model have their own.
        may_replay: (batch, dtype, device) -> whether kernels take a decoding step in all adapted layers that read the
            cache's length on the device; such a step on a static cache waits for nothing, and a graph of it may be
            replayed. None: no step is taken so.

    Raises:
        TypeError: not a model from transformers.
        ValueError: its decoder layers cannot be found or hooked, or it attends in both directions. The model is then as
            it was.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    backbone, layers = decoder_layers.find(model)
    attentions = direction.self_attentions(layers)
    if (reason := direction.obstacle(backbone, attentions)) is not None:
        raise ValueError(reason)
    for module in (backbone, *layers):
        forward = vars(module).get("_old_forward", vars(module).get("forward"))  # accelerate's hooks keep the first
        if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
            raise ValueError(f"cannot attach: the forward of a {type(module).__name__} is replaced on the instance")
    embedding = getattr(backbone, "embed_tokens", None)
    codebooks = len(embedding) if isinstance(embedding, nn.ModuleList) else 1
    names = _mix_in(backbone, _Backbone)
    vars(backbone)["gci_backbone"] = _BackboneInfo(names, attentions, codebooks, expected_entries, may_replay)
    for number, layer in enumerate(layers):
        masks = [i for i, name in enumerate(_mix_in(layer, _Layer)) if direction.is_self_mask(name)]
        vars(layer)["gci_layer"] = number, tuple(masks)
    if model is not backbone and isinstance(model, GenerationMixin):
        if not isinstance(model, _Generating):
            add_mixin(model, _Generating)
        vars(model)["gci_expected_entries"] = expected_entries
    return Handle(model, backbone, layers)


def _mix_in(module: Any, mixin: type) -> tuple[str, ...]:
    """Gives `module` the mixin, once; returns the names of what its own forward takes by position, self left out."""
    if not isinstance(module, mixin):
        add_mixin(module, mixin)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(type(module)._gci_parts[0].forward).parameters
    return tuple(name for name, p in parameters.items() if p.kind in kinds)[1:]
