"""What one forward of a backbone was given, and what an adapted layer may ask about it.

:func:`read` makes a :class:`ForwardContext` from the arguments of the backbone's forward; sequence.py passes it on to
the decoder layers, each of which makes a :class:`LayerContext` of it.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from gci_kernels.generation import forward_arguments, model_cache
from gci_kernels.generation.adapter_cache import AdapterCache
from gci_kernels.generation.direction import check_mask, is_self_mask
from gci_kernels.ops.attention import Sequence
from gci_kernels.ops.transforms import captured

#: Gives (layer key, adapter) of each past that the adapted layers of the next forward will ask for.
ExpectedEntries = Callable[[], Iterable[tuple[str, str]]]
#: (batch, dtype of the layers' input, its device) -> whether kernels take a decoding step of all adapted layers that
#: read the cache's length on the device, so that a graph of the step may be replayed.
MayReplay = Callable[[int, torch.dtype, torch.device], bool]
LayerInfo = tuple[int, tuple[int, ...]]  # a decoder layer's number; which of its positional arguments are masks


class LayerContext:
    """What the adapted layers within one decoder layer may know in a forward.

    Attributes:
        shape: batch and time of the new tokens; some models give their inner layers [batch * time, features].
        layer: the number of the decoder layer.
        run: how often the decoder layer has run before in this forward, counted where there is a cache.
        cache: the past of all adapters; None where the model uses no cache.
        obstacle: why nothing can be stored beside the model's cache, or None.
        caches: whether the model uses a cache, of whatever kind.
    """

    def __init__(
        self, forward: "ForwardContext", layer: int, run: int, cache: AdapterCache | None, obstacle: str | None
    ) -> None:
        self._forward, self.shape = forward, forward.shape
        self.layer, self.run, self.cache, self.obstacle = layer, run, cache, obstacle
        self.caches = cache is not None or obstacle is not None

    @property
    def sequence(self) -> Sequence:
        """Which positions belong together; its segments are on the device of the layer's hidden states."""
        return self._forward.made_sequence or self._forward.sequence

    def past(self, layer_key: str, adapter: str, new: Tensor) -> Tensor | None:
        """What one adapter of one layer kept of the tokens before these, [batch, past, width]; None: nothing.

        Args:
            layer_key: any name of the layer that is unique in the model.
            adapter: the adapter's name.
            new: [batch, any, width], like what :meth:`keep` will be given; it may be empty.

        Raises:
            TypeError: the model's cache is of a kind that is not supported.
            ValueError: the cache was not filled by this model with this adapter. It is then as it was.
        """
        if self.obstacle is not None:
            raise TypeError(self.obstacle)
        return None if self.cache is None else self.cache.past(layer_key, adapter, self._forward.sequence.past, new)

    def keep(self, layer_key: str, adapter: str, kv: Tensor) -> None:
        """Stores kv [batch, time, width] of these tokens where the model has a cache; once a forward for each adapter.

        Raises:
            ValueError: as :meth:`AdapterCache.keep`.
        """
        if self.cache is not None:
            self.cache.keep(layer_key, adapter, kv, past=self._forward.sequence.past)

    def reserve(
        self, layer_key: str, adapter: str, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, int | Tensor, Tensor | None] | None:
        """In place of :meth:`past` and :meth:`keep`, for a kernel that writes the one new token of each sequence.

        None where the forward is no such step: it has more tokens or no cache, or gradients are recorded.

        Args:
            layer_key, adapter: as in :meth:`past`.
            width, dtype, device: of the new token's keys and values.

        Returns:
            The buffer [batch, capacity, width]; how many of its tokens are filled, a number or, on a GPU and in
            compiled graphs, int32 [1]; segments as in Sequence, int32 [batch, at least filled + 1] with rows without
            gaps, or None.

        Raises:
            ValueError: as :meth:`AdapterCache.reserve`.
        """
        cache, forward = self.cache, self._forward
        if cache is None or self.shape[1] != 1 or torch.is_grad_enabled():
            return None
        spec = (self.shape[0], width, dtype, device)
        if forward.length_on_device is not None:
            return cache.reserve_static(layer_key, adapter, spec), forward.length_on_device, forward.segments
        sequence = forward.made_sequence or forward.sequence
        kv, segments = cache.reserve(layer_key, adapter, spec, past=sequence.past), sequence.segments
        if segments is not None and segments.stride(1) != 1:
            segments = segments.contiguous()
        known = forward.past
        past = known[1] if known is not None and known[0] == device else forward.past_for_kernel(device)
        return kv, past, segments


class ForwardContext:
    """What one forward of a backbone was given. Not a dataclass: FSDP takes those apart to look for tensors.

    Attributes:
        shape: batch and time of the new tokens.
        length_on_device: the cache's length, int32 [1] on its device, in a decoding step on a static cache that
            depends on no number of this process: as a CUDA graph, or in a graph of torch.compile, it may be replayed
            at any length of the sequence. Its `sequence` is made only where something asks for it. None in all other
            forwards.
        segments: beside length_on_device: int32 [batch, at least its value + 1], or None.
        packed: whether the segments of `sequence`, if any, are packed sequences.
        uses_cache: whether adapters store what they compute beside the model's cache, where it has one.
        made_sequence: `sequence`, once it has been made.
        past: a device, and what :meth:`past_for_kernel` gives for it; None: nothing yet.
    """

    def __init__(
        self, make_sequence: Callable[[int | None], Sequence], shape: tuple[int, int],
        expected_entries: ExpectedEntries | None, cache: Cache | None,
    ) -> None:  # fmt: skip
        self.shape = shape
        self.length_on_device: Tensor | None = None
        self.segments: Tensor | None = None
        self.packed = False
        self.uses_cache = True
        self._make_sequence = make_sequence
        self.made_sequence: Sequence | None = None
        self._expected_entries = expected_entries
        self._given_cache = cache  # None: the model makes one, or none
        # Of the cache that the decoder layers were given last: itself, the adapters' beside it, or why there is none.
        self._cache: Cache | None = None
        self._adapter_cache: AdapterCache | None = None
        self._obstacle: str | None = None
        self._runs: dict[int, int] = {}
        self._checked_masks: list[object] = []
        self.past: tuple[torch.device, int | Tensor] | None = None

    def make_replayable(self, mask: Any, may_replay: MayReplay, device: torch.device) -> bool:
        """Sets length_on_device and segments, and returns True, if this is a decoding step that may be replayed.

        Args:
            mask: as the model gets it, or None.
            may_replay: as in :func:`gci_kernels.generation.sequence.attach`.
            device: of the model's input.
        """
        batch, time = self.shape
        cache, adapters = self._given_cache, model_cache.find(self._given_cache)
        if time != 1 or cache is None or adapters is None or self._expected_entries is None:
            return False
        if torch.is_grad_enabled() or not (_is_asynchronous(device) or torch.compiler.is_compiling()):
            return False
        length = model_cache.length_on_device(cache)
        if length is None or not (mask is None or forward_arguments.is_key_mask(mask, batch)):
            return False
        dtype = adapters.static_dtype(self._expected_entries())
        if dtype is None or not may_replay(batch, dtype, device):
            return False
        self.length_on_device = length
        if mask is not None:
            self.segments = forward_arguments.segments_from_key_mask(mask.to(device), batch, adapters.max_length)
        adapters.stop_counting()
        return True

    @property
    def sequence(self) -> Sequence:
        """Which positions belong together; its segments are on the device of the present layer's hidden states."""
        if self.made_sequence is None:
            # The length has to be that before the forward; the first layer may have written to the cache since.
            past = None if self.length_on_device is None else int(self.length_on_device)
            self.made_sequence = self._make_sequence(past)
        return self.made_sequence

    def past_for_kernel(self, device: torch.device) -> int | Tensor:
        """sequence.past as a kernel on `device` takes it: a number, or, on a GPU and in compiled graphs, int32 [1].

        Kept in `past` for the other layers on the device.
        """
        past, on_device = self.sequence.past, _is_asynchronous(device) or torch.compiler.is_compiling()
        self.past = device, torch.full((1,), past, dtype=torch.int32, device=device) if on_device else past
        return self.past[1]

    def layer_context(self, info: LayerInfo, args: tuple, kwargs: dict[str, Any]) -> LayerContext:
        """The context of one decoder layer.

        Args:
            info: of the layer.
            args, kwargs: of its forward.

        Raises:
            ValueError: the layer's hidden states are not of these tokens, its mask lets tokens attend to later ones, or
                its cache is missing or does not fit the adapters.
            TypeError: adapters cannot store anything beside its cache.
        """
        number, mask_indices = info
        hidden = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
        size = hidden.shape
        if self.shape not in (tuple(size[:2]), tuple(size[-3:-1])):
            raise ValueError(
                f"the decoder layer got hidden states {list(size)} in a forward of [batch, time] {self.shape}; models "
                "that change the sequence on its way are not supported"
            )
        # Gradient checkpointing takes the cache out of a layer's arguments, so it is looked for in them each time.
        cache = None
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                cache = value
                break
        if self.length_on_device is None or cache is None:
            sequence = self.sequence
            if sequence.segments is not None and sequence.segments.device != hidden.device:
                sequence = self.made_sequence = Sequence(sequence.segments.to(hidden.device), sequence.past)
            if not sequence.past and self.shape[1] > 1:
                self._check_masks(mask_indices, args, kwargs)
            if cache is None or not self.uses_cache:
                return self._without_cache(number)
        elif self.length_on_device.device != hidden.device:  # of a model on several devices
            self.length_on_device = self.length_on_device.to(hidden.device)
            self.segments = None if self.segments is None else self.segments.to(hidden.device)
        if cache is not self._cache:
            self._begin_cache(cache)
        run = self._runs.get(number, 0)
        self._runs[number] = run + 1
        return LayerContext(self, number, run, self._adapter_cache, self._obstacle)

    def _without_cache(self, layer: int) -> LayerContext:
        if self.sequence.past:
            raise ValueError(
                "past_key_values does not reach the decoder layers; with gradient checkpointing in training there can "
                "be none"
            )
        return LayerContext(self, layer, 0, None, None)

    def _check_masks(self, indices: tuple[int, ...], args: tuple, kwargs: dict[str, Any]) -> None:
        """Checks the masks that a layer was given, which most often are those of the layers before it."""
        given = [args[i] for i in indices if i < len(args)]
        given += [value for name, value in kwargs.items() if value is not None and is_self_mask(name)]
        for mask in given:
            if mask is not None and all(mask is not checked for checked in self._checked_masks):
                check_mask(mask, self.sequence.segments, *self.shape)
                self._checked_masks.append(mask)

    def _begin_cache(self, given: Cache) -> None:
        """Checks, at the first layer, when nothing has been written, that all adapted layers will find their past."""
        cache = forward_arguments.decoder_cache(given)
        reason = model_cache.obstacle(cache)
        adapters = model_cache.get_or_create(cache) if reason is None else None
        if self.length_on_device is None:
            self._check_cache(adapters, reason)
            if adapters is not None and cache is not self._given_cache:
                adapters.begin_forward(self.shape[1])
        self._cache, self._adapter_cache, self._obstacle = given, adapters, reason

    def _check_cache(self, adapters: AdapterCache | None, reason: str | None) -> None:
        expected = list(self._expected_entries()) if self._expected_entries is not None else []
        if expected and reason is not None:
            raise TypeError(reason)
        if adapters is None:
            return
        adapters.check(expected, self.sequence.past)
        if not self.sequence.past:
            adapters.packed = self.sequence.segments if self.packed else None
        elif adapters.packed is not None:
            if bool((adapters.packed != adapters.packed[:, :1]).any()):
                raise ValueError("past_key_values holds packed sequences, which cannot be continued")
            adapters.packed = None


def read(
    arguments: Mapping[str, Any], expected_entries: ExpectedEntries | None, may_replay: MayReplay | None = None, *,
    codebooks: int = 1, packs: bool = True,
) -> ForwardContext | None:  # fmt: skip
    """Reads a backbone's arguments.

    None where it has no input, of which the model itself tells the user, and where no adapter wants to know anything.

    Args:
        arguments: of the backbone's forward, by name.
        expected_entries, may_replay: as in :func:`gci_kernels.generation.sequence.attach`.
        codebooks: how many rows of input_ids make up one row of the batch.
        packs: whether the model takes position_ids that start again for packed sequences.

    Raises:
        TypeError: adapters cannot store anything beside its cache.
        ValueError: its mask or positions have another shape or meaning, or its cache cannot be part of a graph.
    """
    embeds, ids = arguments.get("inputs_embeds"), arguments.get("input_ids")
    inputs = ids if embeds is None else embeds
    if inputs is None:
        return None
    batch, time = inputs.shape[0] // (codebooks if embeds is None else 1), inputs.shape[1]
    cache, reason = forward_arguments.find_cache(arguments)
    adapters = None
    if cache is not None and model_cache.obstacle(cache) is None:
        adapters = model_cache.get_or_create(cache)
    if expected_entries is not None and not any(True for _ in expected_entries()):
        if cache is not None and adapters is not None:  # what it holds is counted before the model writes to it
            model_cache.length(cache)
            adapters.begin_forward(time)
        return None
    if reason is not None:
        raise TypeError(reason)
    if cache is not None and captured() and expected_entries is not None:
        raise ValueError(
            "past_key_values: a graph of torch.jit.trace or torch.export has no place for what these adapters keep "
            "beside it; make the graph of a forward with use_cache=False"
        )
    mask = forward_arguments.full_attention_mask(arguments.get("attention_mask"))
    make = functools.partial(_make_sequence, arguments, cache, mask, (batch, time), inputs.device, packs)
    context = ForwardContext(make, (batch, time), expected_entries, cache)
    if may_replay is not None and context.make_replayable(mask, may_replay, inputs.device):
        return context
    segments = context.sequence.segments  # made now, so that errors are raised before the model does anything
    context.packed = mask is None and segments is not None
    if adapters is not None:
        adapters.begin_forward(time)
    # Where use_cache is left on in training, each step makes a cache that is not used; adapters beside it would break
    # a graph of torch.compile. Nor can a graph that outlives this call hold one.
    compiled_training = torch.compiler.is_compiling() and torch.is_grad_enabled()
    context.uses_cache = cache is not None or not (compiled_training or captured())
    return context


def _make_sequence(
    arguments: Mapping[str, Any], cache: Cache | None, mask: Any, shape: tuple[int, int], device: torch.device,
    packs: bool, past: int | None,
) -> Sequence:  # fmt: skip
    """The sequences of a forward behind `past` tokens; None: as many as the cache holds now."""
    if past is None:
        past = 0 if cache is None else model_cache.length(cache)
    if mask is not None:
        return forward_arguments.sequence_from_mask(mask, *shape, past, device)
    return forward_arguments.sequence_from_positions(arguments, *shape, past, packs)


def _is_asynchronous(device: torch.device) -> bool:
    """Whether `device` runs kernels while this process goes on, so that to read a tensor there is to wait for it."""
    return device.type == "cuda"
