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

import functools
import inspect
import threading
from collections.abc import Callable, Iterable
from types import MethodType

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from gci_kernels import adapter_cache
from gci_kernels.adapter_cache import AdapterCache
from gci_kernels.ops.attention import Sequence
from gci_kernels.ops.decode import MAX_TOKENS, has_kernels
from gci_kernels.swapped import Swapped, subclass

Wanted = Callable[[], Iterable[tuple[str, str]]]

_FRAME = "gci_frame"  # the decoder layers' additional argument

_CUSTOM_MASK = (
    "attention_mask: a 4-D mask must be causal with padded keys left out, as transformers makes it for a static cache; "
    "custom masks, biases and sliding windows are not supported. Give the 2-D mask [batch, keys]"
)


class Context:
    """What an adapted layer may know in a forward.

    Attributes:
        shape: batch and time of the new tokens; some models give their inner layers [batch * time, features].
        cache: the past of all adapters; None where the model uses no cache.
        obstacle: why the model's cache can hold nothing of an adapter, or None.
    """

    def __init__(self, frame: "_Frame", cache: AdapterCache | None, obstacle: str | None) -> None:
        self._frame, self.shape, self.cache, self.obstacle = frame, frame.shape, cache, obstacle

    @property
    def sequence(self) -> Sequence:
        """Which positions belong together; its segments are on the device of the layer's hidden states."""
        return self._frame.sequence

    def past(self, layer_key: str, adapter: str, new: Tensor) -> Tensor | None:
        """What one adapter of one layer kept of the tokens before these, [batch, past, width]; None: nothing.

        `new`: [batch, any, width], like what :meth:`keep` will be given; it may be empty.

        Raises:
            TypeError: the model's cache is of a kind that is not supported.
            ValueError: the cache was not filled by this model with this adapter. It is then as it was.
        """
        if self.obstacle is not None:
            raise TypeError(self.obstacle)
        return None if self.cache is None else self.cache.past(layer_key, adapter, self.sequence.past, new)

    def keep(self, layer_key: str, adapter: str, kv: Tensor) -> None:
        """Keeps kv [batch, time, width] of these tokens where the model has a cache; once a forward for each adapter.

        Raises:
            ValueError: as :meth:`AdapterCache.keep`.
        """
        if self.cache is not None:
            self.cache.keep(layer_key, adapter, kv, past=self.sequence.past)

    def room(
        self, layer_key: str, adapter: str, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, int | Tensor, Tensor | None] | None:
        """In place of :meth:`past` and :meth:`keep`, for a kernel that writes the one new token of each sequence.

        None where that is not what this forward is: it has more tokens or no cache, or gradients are recorded.

        Returns:
            The buffer [batch, capacity, width]; how many of its tokens are filled, a number or, on a GPU and in
            compiled graphs, int32 [1]; segments as in Sequence, int32 [batch, at least filled + 1] with rows without
            gaps, or None.

        Raises:
            ValueError: as :meth:`AdapterCache.room`.
        """
        if self.cache is None or self.obstacle is not None or self.shape[1] != 1 or torch.is_grad_enabled():
            return None
        form, frame = (self.shape[0], width, dtype, device), self._frame
        if frame.position is not None:
            return self.cache.place(layer_key, adapter, form), frame.position, frame.segments
        sequence = frame.sequence
        kv, segments = self.cache.room(layer_key, adapter, form, past=sequence.past), sequence.segments
        if segments is not None and segments.stride(1) != 1:
            segments = segments.contiguous()
        return kv, frame.past_on(device) if _runs_by_itself(device) else sequence.past, segments


class _State:
    """What is set in one thread."""

    def __init__(self) -> None:
        self.frame: _Frame | None = None
        self.context: Context | None = None


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
            "gci_kernels.sequence.attach, and run inside of that model's forward; for gradient checkpointing use "
            "model.gradient_checkpointing_enable()"
        )
    return context


class _Frame:
    """What one forward of a backbone was given. Not a dataclass: FSDP takes those apart to look for tensors.

    With `position` it is a decoding step on a static cache that no number of this process describes: as part of a CUDA
    graph, or in a graph of torch.compile, it may be run again at any length of the sequence. Its sequence is made only
    where something asks for it after all.
    """

    def __init__(self, make: Callable[..., Sequence], shape: tuple[int, int], wanted: Wanted | None) -> None:
        self._make, self.shape, self.wanted = make, shape, wanted
        self._sequence: Sequence | None = None
        self.position: Tensor | None = None  # int32 [1], the cache's length on its device
        self.segments: Tensor | None = None  # beside position: int32 [batch, at least position + 1]
        self.packed = False  # whether segments, if any, are packed sequences
        self.keeps = True  # whether what adapters compute is kept in the model's cache
        self._checked: Cache | None = None
        self._past: Tensor | None = None

    @property
    def sequence(self) -> Sequence:
        if self._sequence is None:
            # The cache's own length would be another one here: the first layer has written to it.
            self._sequence = self._make() if self.position is None else self._make(int(self.position))
        return self._sequence

    def past_on(self, device: torch.device) -> Tensor:
        """sequence.past as int32 [1] on `device`, made once for all layers there."""
        if self._past is None or self._past.device != device:
            self._past = torch.full((1,), self.sequence.past, dtype=torch.int32, device=device)
        return self._past

    def context(self, args: tuple, kwargs: dict) -> Context:
        """The context of one decoder layer, from the arguments of its forward."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if tuple(hidden.shape[:2]) != self.shape:
            raise ValueError(
                f"the decoder layer got hidden states {list(hidden.shape)} in a forward of [batch, time] {self.shape}; "
                "models that change the sequence on its way are not supported"
            )
        # Checkpointing takes the cache out of a layer's arguments, so the layer's own count, not the backbone's.
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if self.position is not None and cache is not None:
            if self.position.device != hidden.device:  # of a model on several
                self.position = self.position.to(hidden.device)
                self.segments = None if self.segments is None else self.segments.to(hidden.device)
            return Context(self, adapter_cache.adopt(cache), None)
        segments = self.sequence.segments
        if segments is not None and segments.device != hidden.device:
            self._sequence = Sequence(segments.to(hidden.device), self.sequence.past)
        if cache is None or not self.keeps:
            if self.sequence.past:
                raise ValueError("past_key_values does not reach the decoder layers; with gradient checkpointing in "
                                 "training there can be none")  # fmt: skip
            return Context(self, None, None)
        reason = adapter_cache.obstacle(cache)
        kept = adapter_cache.adopt(cache) if reason is None else None
        if self._checked is not cache:
            self._check(kept, reason)
            self._checked = cache
        return Context(self, kept, reason)

    def _check(self, kept: AdapterCache | None, reason: str | None) -> None:
        """At the first layer, when nothing has been written yet: that all adapted layers will find their past."""
        wanted = list(self.wanted()) if self.wanted is not None else []
        if wanted and reason is not None:
            raise TypeError(reason)
        if kept is None:
            return
        kept.check(wanted, self.sequence.past)
        if not self.sequence.past:
            kept.packed = self.sequence.segments if self.packed else None
        elif kept.packed is not None:
            if bool((kept.packed != kept.packed[:, :1]).any()):
                raise ValueError("past_key_values holds packed sequences, which cannot be continued")
            kept.packed = None


class _Backbone(Swapped):
    """Mixin for the class of the module that calls the decoder layers."""

    def forward(self, base_forward: Callable, *args, **kwargs):
        frame = _frame({**dict(zip(self.gci_arguments, args, strict=False)), **kwargs}, self.gci_wanted)
        state = _thread.state
        before, state.frame = state.frame, frame
        try:
            return base_forward(self, *args, **kwargs)
        finally:
            state.frame = before


class _Layer(Swapped):
    """Mixin for the class of the decoder layers."""

    def __call__(self, *args, **kwargs):
        if (frame := _thread.state.frame) is not None:
            kwargs.setdefault(_FRAME, frame)
        return super().__call__(*args, **kwargs)

    def forward(self, base_forward: Callable, *args, **kwargs):
        frame = kwargs.pop(_FRAME, None)
        context = None if frame is None else frame.context(args, kwargs)
        state = _thread.state
        before, state.context = state.context, context
        try:
            return base_forward(self, *args, **kwargs)
        finally:
            state.context = before


def _frame(given: dict, wanted: Wanted | None) -> _Frame | None:
    """Reads a backbone's arguments; None where it has no input, of which the model itself tells the user."""
    ids, embeds, mask = given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
    if ids is None and embeds is None:
        return None
    batch, time = ids.shape if embeds is None else embeds.shape[:2]
    device = (ids if embeds is None else embeds).device
    cache = given.get("past_key_values")
    if cache is not None and not isinstance(cache, Cache):
        raise TypeError(f"past_key_values must be a transformers Cache, got {type(cache).__name__}")
    if cache is not None and adapter_cache.obstacle(cache) is None:
        adapter_cache.adopt(cache)
    if isinstance(mask, dict):
        mask = _full_mask(mask)
    frame = _Frame(functools.partial(_sequence, given, mask, batch, time, device), (batch, time), wanted)
    if time == 1 and cache is not None and _counts_on_device(cache, mask, wanted, batch, device):
        frame.position = adapter_cache.position(cache)
        frame.segments = None if mask is None else _segments(mask.to(device), batch, cache.gci_adapters.max_length)
        cache.gci_adapters.leave_count()
        return frame
    segments = frame.sequence.segments  # made now, so that what is wrong is said before the model does anything
    frame.packed = mask is None and segments is not None
    # Where use_cache is left on in training, a cache is made and dropped in each step; to adopt one breaks the graph.
    frame.keeps = cache is not None or not (torch.compiler.is_compiling() and torch.is_grad_enabled())
    return frame


def _sequence(
    given: dict, mask: Tensor | None, batch: int, time: int, device: torch.device, past: int | None = None
) -> Sequence:
    if past is None:
        cache = given.get("past_key_values")
        past = 0 if cache is None else adapter_cache.length(cache)
    if mask is not None:
        return _from_mask(mask, batch, time, past, device)
    return _from_positions(given, batch, time, past)


def _runs_by_itself(device: torch.device) -> bool:
    """Whether `device` works while this process goes on, which would wait for it to read a tensor there."""
    return device.type == "cuda"


def _counts_on_device(
    cache: Cache, mask: Tensor | None, wanted: Wanted | None, batch: int, device: torch.device
) -> bool:
    """Whether a step on `cache` needs no number of this process; see _Frame."""
    if wanted is None or torch.is_grad_enabled() or not (torch.compiler.is_compiling() or _runs_by_itself(device)):
        return False
    if batch > MAX_TOKENS or torch.is_autocast_enabled(device.type):  # no layer will take the step then
        return False
    if mask is not None and not _is_plain(mask, batch):
        return False
    kept = getattr(cache, "gci_adapters", None)
    if kept is None or adapter_cache.position(cache) is None:
        return False
    dtype = kept.static_dtype(wanted())
    return dtype is not None and has_kernels(dtype, device.type, attends=True)


def _is_plain(mask: object, batch: int) -> bool:
    """Whether the mask of one query says by its shape and dtype what it is.

    A floating one has to be looked at, for it may hold more than what is seen and what is not.
    """
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.shape[0] not in (1, batch):
        return False
    return mask.dim() == 2 or (mask.dim() == 4 and mask.shape[1:3] == (1, 1))


def _segments(mask: Tensor, batch: int, capacity: int) -> Tensor:
    """Segments of the keys that the only query attends to, int32 [batch, at least capacity].

    A kernel that is replayed reads those of tokens that came after the mask, which then are padding.
    """
    segments = (mask if mask.dim() == 2 else mask[:, 0, 0]).bool().expand(batch, -1).int() - 1
    missing = capacity - segments.shape[1]
    return segments if missing <= 0 else torch.nn.functional.pad(segments, (0, missing), value=-1)


def _full_mask(masks: dict):
    """Of the masks for each type of layer, the one that hides nothing but padding."""
    if "full_attention" not in masks:
        raise ValueError(f"attention_mask has masks for {sorted(masks)}, but none for full_attention")
    return masks["full_attention"]


def _from_mask(mask, batch: int, time: int, past: int, device: torch.device) -> Sequence:
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        found = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be [batch, keys] or as transformers makes it from that, got {found}")
    keys = past + time
    if mask.shape[0] not in (1, batch) or mask.shape[-1] < keys:
        raise ValueError(f"attention_mask must be at least [{batch}, {keys}], got {list(mask.shape)}")
    if mask.dim() == 4:
        mask = _from_4d(mask, time, past)
    # A static cache has places for more keys than there are; what lies behind is not there yet.
    mask = mask[:, :keys].expand(batch, -1).to(device)
    if torch.compiler.is_compiling():  # from_mask looks at the values, which would break the graph
        return Sequence(mask.bool().int() - 1, past)
    return Sequence.from_mask(mask, past)


def _from_4d(mask: Tensor, time: int, past: int) -> Tensor:
    """The 2-D mask, bool [batch, keys], from which transformers made `mask` [batch, 1, time, >= keys].

    The last query attends every key that is not padded. More queries could have been given any mask, so then what
    follows from the 2-D one is compared with it, which waits for the device; a single query, as in decoding, cannot
    tell a custom mask from padding, and need not.
    """
    keys = past + time
    if mask.shape[1] != 1 or mask.shape[2] != time:
        raise ValueError(f"{_CUSTOM_MASK}, got {list(mask.shape)} for {time} tokens")
    floating = mask.is_floating_point()
    allowed = mask[:, 0] == 0 if floating else mask[:, 0].bool()
    unpadded = allowed[:, -1, :keys]
    if time > 1 or floating:
        causal = torch.ones(time, keys, dtype=torch.bool, device=mask.device).tril(past)
        expected = torch.zeros_like(allowed)
        expected[..., :keys] = causal & unpadded[:, None]
        # A padded query attends nothing, or, where that would be NaN, whatever transformers lets it.
        same = ((allowed == expected) | ~expected.any(-1, keepdim=True)).all()
        if floating:
            same &= ((mask == 0) | (mask <= torch.finfo(mask.dtype).min)).all()
        if not bool(same):
            raise ValueError(_CUSTOM_MASK)
    return unpadded


def _from_positions(given: dict, batch: int, time: int, past: int) -> Sequence:
    """Without a mask: packed sequences, if there are any, by their lengths or by positions that start again."""
    lengths, positions = given.get("cu_seq_lens_q"), given.get("position_ids")
    if past or (lengths is None and positions is None):
        return Sequence(None, past)
    if lengths is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q needs all sequences in one row, got a batch of {batch}")
        return Sequence.from_cu_seqlens(lengths, time)
    if positions.dim() != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != time:
        raise ValueError(
            f"position_ids without an attention_mask must be [{batch}, {time}], got {list(positions.shape)}"
        )
    positions = positions.expand(batch, -1)
    if torch.compiler.is_compiling():
        starts = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
        return Sequence(starts.cumsum(1, dtype=torch.int32), past)
    return Sequence.from_position_ids(positions)


class Handle:
    """The way back from :func:`attach`."""

    def __init__(self, backbone: nn.Module, layers: nn.ModuleList) -> None:
        self._backbone, self._layers = backbone, layers

    def detach(self) -> None:
        """Gives every module its own class back; nothing of :func:`attach` stays. Twice does the same as once.

        Raises:
            RuntimeError: a module's class has been changed since (FSDP does that); nothing is detached then.
        """
        modules = [module for module in (*self._layers, self._backbone) if isinstance(module, (_Layer, _Backbone))]
        for module in modules:
            if "_gci_parts" not in vars(type(module)):
                raise RuntimeError(f"cannot detach: {type(module).__name__} has been given another class since")
        for module in modules:
            _give_class(module, type(module)._gci_parts[0])
        for name in ("gci_arguments", "gci_wanted"):
            vars(self._backbone).pop(name, None)


def attach(model: nn.Module, wanted: Wanted | None = None) -> Handle:
    """Makes :func:`current` answer inside of the decoder layers of `model`. Attaching again changes only `wanted`.

    Args:
        model: a decoder-only model from transformers, or a PeftModel around one.
        wanted: gives (layer_key, adapter) for each call of :meth:`Context.update` that the next forward will make.
            With it a cache that does not fit is refused before the model writes to it; without, the layer that finds
            no past raises, and layers before it have been written. A bound method, so that copies of the model follow.

    Raises:
        TypeError: not a model from transformers.
        ValueError: its decoder layers cannot be found or hooked. The model is then as it was.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    backbone, layers = _find(model)
    for module in (backbone, *layers):
        if "forward" in vars(module) and "_old_forward" not in vars(module):
            raise ValueError(f"cannot attach: the forward of a {type(module).__name__} is replaced on the instance")
    if not isinstance(backbone, _Backbone):
        _give_class(backbone, subclass(type(backbone), _Backbone))
        code = type(backbone)._gci_parts[0].forward
        backbone.gci_arguments = _positional(code)
    backbone.gci_wanted = wanted
    for layer in layers:
        if not isinstance(layer, _Layer):
            _give_class(layer, subclass(type(layer), _Layer))
    return Handle(backbone, layers)


def _give_class(module: nn.Module, cls: type) -> None:
    before = type(module).forward
    module.__class__ = cls
    # accelerate's hooks for models on several devices keep the forward of the class that they found.
    if getattr(vars(module).get("_old_forward"), "__func__", None) is before:
        module._old_forward = MethodType(cls.forward, module)


def _positional(forward: Callable) -> tuple[str, ...]:
    """The names of the arguments that `forward` takes by position, self left out."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(forward).parameters.items() if p.kind in kinds)[1:]


def _find(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The backbone and its decoder layers: the only list of modules of one class among the backbone's children."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel, or a PeftModel around one, got {type(model).__name__}")
    if model.config.is_encoder_decoder:
        raise ValueError(f"model must be decoder-only, got the encoder-decoder {type(model).__name__}")
    backbone = model.get_decoder()
    lists = {name: child for name, child in backbone.named_children() if isinstance(child, nn.ModuleList)}
    alike = [child for child in lists.values() if len({type(layer) for layer in child}) == 1]
    if len(alike) != 1:
        found = {name: sorted({type(layer).__name__ for layer in child}) for name, child in lists.items()}
        raise ValueError(
            f"model: the decoder layers of {type(backbone).__name__} must be its only ModuleList with modules of one "
            f"class, found {found or 'no ModuleList'}"
        )
    return backbone, alike[0]
