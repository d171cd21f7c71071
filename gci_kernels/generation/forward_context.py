"""What one forward of a backbone was given: the frame, made of its arguments, and what a layer may ask it.

See sequence.py beside it, which carries it to the decoder layers.
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import Cache

from gci_kernels.generation import adapter_cache, given_cache
from gci_kernels.generation.adapter_cache import AdapterCache
from gci_kernels.generation.direction import check_mask, is_self_mask
from gci_kernels.limits import MAX_DECODE_TOKENS
from gci_kernels.ops.attention import Sequence
from gci_kernels.ops.decode import has_kernels
from gci_kernels.ops.transforms import captured

Wanted = Callable[[], Iterable[tuple[str, str]]]

_CUSTOM_MASK = (
    "attention_mask: a 4-D mask must be causal with padded keys left out, as transformers makes it for a static cache; "
    "custom masks, biases and sliding windows are not supported. Give the 2-D mask [batch, keys]"
)


class Context:
    """What an adapted layer may know in a forward.

    Attributes:
        shape: batch and time of the new tokens; some models give their inner layers [batch * time, features].
        layer: the number of the decoder layer.
        run: how often the decoder layer has run before in this forward, counted where there is a cache.
        cache: the past of all adapters; None where the model uses no cache.
        obstacle: why the model's cache can hold nothing of an adapter, or None.
    """

    def __init__(self, frame: "Frame", layer: int, cache: AdapterCache | None, obstacle: str | None) -> None:
        self._frame, self.shape, self.layer = frame, frame.shape, layer
        self.cache, self.obstacle = cache, obstacle
        self.run = 0 if cache is None else frame.runs(layer)

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
        on_device = _runs_by_itself(device) or torch.compiler.is_compiling()
        return kv, frame.past_on(device) if on_device else sequence.past, segments


class Frame:
    """What one forward of a backbone was given. Not a dataclass: FSDP takes those apart to look for tensors.

    With `position` it is a decoding step on a static cache that no number of this process describes: as part of a CUDA
    graph, or in a graph of torch.compile, it may be run again at any length of the sequence. Its sequence is made only
    where something asks for it after all.
    """

    def __init__(
        self, make: Callable[..., Sequence], shape: tuple[int, int], wanted: Wanted | None, cache: Cache | None
    ) -> None:
        self._make, self.shape, self.wanted = make, shape, wanted
        self._given = cache  # None: the model makes one, or none
        self._sequence: Sequence | None = None
        self.position: Tensor | None = None  # int32 [1], the cache's length on its device
        self.segments: Tensor | None = None  # beside position: int32 [batch, at least position + 1]
        self.packed = False  # whether segments, if any, are packed sequences
        self.keeps = True  # whether what adapters compute is kept in the model's cache
        self._checked: Cache | None = None
        self._runs: dict[int, int] = {}
        self._masks: list[object] = []  # that were looked at
        self._past: Tensor | None = None

    @property
    def sequence(self) -> Sequence:
        if self._sequence is None:
            # The cache's own length would be another one here: the first layer has written to it.
            self._sequence = self._make() if self.position is None else self._make(int(self.position))
        return self._sequence

    def runs(self, layer: int) -> int:
        """How often this was called for a decoder layer before."""
        before = self._runs.get(layer, 0)
        self._runs[layer] = before + 1
        return before

    def past_on(self, device: torch.device) -> Tensor:
        """sequence.past as int32 [1] on `device`, made once for all layers there."""
        if self._past is None or self._past.device != device:
            self._past = torch.full((1,), self.sequence.past, dtype=torch.int32, device=device)
        return self._past

    def context(self, layer: nn.Module, args: tuple, kwargs: dict) -> Context:
        """The context of one decoder layer, from the arguments of its forward."""
        number, masks = layer.gci_layer
        hidden = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
        if self.shape not in (tuple(hidden.shape[:2]), tuple(hidden.shape[-3:-1])):
            raise ValueError(
                f"the decoder layer got hidden states {list(hidden.shape)} in a forward of [batch, time] {self.shape}; "
                "models that change the sequence on its way are not supported"
            )
        # Checkpointing takes the cache out of a layer's arguments, so the layer's own count, not the backbone's.
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        cache = given_cache.unwrapped(cache)
        if self.position is not None and cache is not None:
            if self.position.device != hidden.device:  # of a model on several
                self.position = self.position.to(hidden.device)
                self.segments = None if self.segments is None else self.segments.to(hidden.device)
            return Context(self, number, adapter_cache.adopt(cache), None)
        segments = self.sequence.segments
        if segments is not None and segments.device != hidden.device:
            self._sequence = Sequence(segments.to(hidden.device), self.sequence.past)
        if self.shape[1] > 1 and not self.sequence.past:
            self._check_direction(masks, args, kwargs)
        if cache is None or not self.keeps:
            if self.sequence.past:
                raise ValueError("past_key_values does not reach the decoder layers; with gradient checkpointing in "
                                 "training there can be none")  # fmt: skip
            return Context(self, number, None, None)
        reason = adapter_cache.obstacle(cache)
        kept = adapter_cache.adopt(cache) if reason is None else None
        if self._checked is not cache:
            self._check(kept, reason)
            self._checked = cache
            if kept is not None and cache is not self._given:
                kept.count_forward(self.shape[1])
        return Context(self, number, kept, reason)

    def _check_direction(self, masks: tuple[int, ...], args: tuple, kwargs: dict) -> None:
        """Of the masks that a layer was given, which most often are those of the layers before it."""
        given = [args[i] for i in masks if i < len(args)]
        given += [value for name, value in kwargs.items() if is_self_mask(name)]
        for mask in given:
            if mask is not None and all(mask is not seen for seen in self._masks):
                check_mask(mask, self.sequence.segments, *self.shape)
                self._masks.append(mask)

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


def read(given: dict, wanted: Wanted | None, codebooks: int = 1, packs: bool = True) -> Frame | None:
    """Reads a backbone's arguments.

    None where it has no input, of which the model itself tells the user, and where no adapter wants to know anything.

    Args:
        given: the arguments of the backbone's forward by name.
        wanted: as in :func:`gci_kernels.generation.sequence.attach`.
        codebooks: how many rows of input_ids make up one row of the batch.
        packs: whether the model takes position_ids that start again for packed sequences.
    """
    ids, embeds, mask = given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
    if ids is None and embeds is None:
        return None
    batch, time = (ids.shape[0] // codebooks, ids.shape[1]) if embeds is None else embeds.shape[:2]
    device = (ids if embeds is None else embeds).device
    cache, reason = given_cache.find(given)
    kept = adapter_cache.adopt(cache) if cache is not None and adapter_cache.obstacle(cache) is None else None
    if wanted is not None and not any(True for _ in wanted()):
        if kept is not None:  # what it holds is counted before the model writes to it
            adapter_cache.length(cache)
            kept.count_forward(time)
        return None
    if reason is not None:
        raise TypeError(reason)
    if cache is not None and captured() and wanted is not None:
        raise ValueError(
            "past_key_values: a graph of torch.jit.trace or torch.export has no place for what these adapters keep "
            "beside it; make the graph of a forward with use_cache=False"
        )
    if isinstance(mask, dict):
        mask = _full_mask(mask)
    make = functools.partial(_sequence, given, cache, mask, (batch, time), device, packs=packs)
    frame = Frame(make, (batch, time), wanted, cache)
    if time == 1 and cache is not None and _counts_on_device(cache, mask, wanted, batch, device):
        frame.position = adapter_cache.position(cache)
        frame.segments = None if mask is None else _segments(mask.to(device), batch, cache.gci_adapters.max_length)
        cache.gci_adapters.leave_count()
        return frame
    segments = frame.sequence.segments  # made now, so that what is wrong is said before the model does anything
    frame.packed = mask is None and segments is not None
    if kept is not None:
        kept.count_forward(time)
    # Where use_cache is left on in training, a cache is made and dropped in each step; to adopt one breaks the graph.
    # Nor has a graph that outlives this call a place for one.
    frame.keeps = cache is not None or not (torch.compiler.is_compiling() and torch.is_grad_enabled() or captured())
    return frame


def _sequence(
    given: dict, cache: Cache | None, mask: Tensor | None, shape: tuple[int, int], device: torch.device,
    past: int | None = None, *, packs: bool,
) -> Sequence:  # fmt: skip
    batch, time = shape
    if past is None:
        past = 0 if cache is None else adapter_cache.length(cache)
    if mask is not None:
        return _from_mask(mask, batch, time, past, device)
    return _from_positions(given, batch, time, past, packs)


def _runs_by_itself(device: torch.device) -> bool:
    """Whether `device` works while this process goes on, which would wait for it to read a tensor there."""
    return device.type == "cuda"


def _counts_on_device(
    cache: Cache, mask: Tensor | None, wanted: Wanted | None, batch: int, device: torch.device
) -> bool:
    """Whether a step on `cache` needs no number of this process; see Frame."""
    if wanted is None or torch.is_grad_enabled() or not (torch.compiler.is_compiling() or _runs_by_itself(device)):
        return False
    if batch > MAX_DECODE_TOKENS or torch.is_autocast_enabled(device.type):  # no layer will take the step then
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
            if not past:
                check_mask(mask, unpadded.int() - 1, mask.shape[0], time)  # says so where it looks ahead
            raise ValueError(_CUSTOM_MASK)
    return unpadded


def _from_positions(given: dict, batch: int, time: int, past: int, packs: bool) -> Sequence:
    """Without a mask: packed sequences, if there are any, by their lengths or by positions that start again."""
    lengths, positions = given.get("cu_seq_lens_q"), given.get("position_ids")
    if past or (lengths is None and positions is None):
        return Sequence(None, past)
    if lengths is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q needs all sequences in one row, got a batch of {batch}")
        return Sequence.from_cu_seqlens(lengths, time)
    if not packs:
        return Sequence(None, past)
    if positions.dim() == 3:  # one for each axis of an image; text's own come first where there are four
        if positions.shape[0] != 4:
            return Sequence(None, past)
        positions = positions[0]
    if positions.dim() != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != time:
        raise ValueError(
            f"position_ids without an attention_mask must be [{batch}, {time}], got {list(positions.shape)}"
        )
    positions = positions.expand(batch, -1)
    if positions.is_floating_point():  # Qwen3-Omni makes whole numbers of that type
        positions = positions.long()
    if torch.compiler.is_compiling():
        starts = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
        return Sequence(starts.cumsum(1, dtype=torch.int32), past)
    return Sequence.from_position_ids(positions)
