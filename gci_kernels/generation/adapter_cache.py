"""Keys and values of an adapter's own attention, kept beside the model's key-value cache in generation.

They ride with the model's `Cache` object itself: :func:`adopt` gives the instance a subclass of its own class, whose
methods do what the class did and then the same to the adapter's tensors. So whatever generate() or a user does to the
cache (reorder_cache in beam search, crop in assisted decoding, batch_repeat_interleave, batch_select_indices, reset,
deepcopy, pickle) is done to both, and dropping the cache drops both. Two other ways were looked at and left: one more
entry in `cache.layers` is taken for a layer of the model (a DynamicCache without a config appends its layers when
they first write, and len(), get_max_length() and is_sliding would all count ours), and a table beside the cache
learns of neither reorder nor deepcopy.

The class is changed once for each cache, which torch.compile cannot trace: there the graph breaks. A cache adopted
before, as in every step of generation but the first, does not break it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from gci_kernels.class_swap import Swapped, subclass
from gci_kernels.ops.transforms import transformed

#: For messages: beside which caches adapters can keep what is theirs.
ALLOWED = "DynamicCache and StaticCache without offloading"
_STORED_OTHERWISE = ("QuantizedLayer", "BaseQuantizedLayer")  # layers of a QuantizedCache, in versions that have them

Form = tuple[int, int, torch.dtype, torch.device]  # of an adapter's keys and values: batch size, width, dtype, device


class _Entry:
    """What one adapter of one layer keeps of past tokens: a buffer [batch, capacity, width], filled up to `length`."""

    def __init__(self, batch: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.kv = torch.empty(batch, 0, width, dtype=dtype, device=device)
        self.length: int | None = 0  # None: as many as the model's cache has, which only the device knows
        self.owned = False  # whether nothing else may read the buffer's unfilled part
        self.recorded = False  # whether any of it was made while gradients were recorded

    @property
    def form(self) -> Form:
        return _form(self.kv)

    def require(self, form: Form, layer_key: str, adapter: str) -> None:
        """Raises ValueError where tokens of `form` cannot follow what is here."""
        kept = self.form
        if kept == form:
            return
        for what, has, given in zip(("batch size", "width", "dtype", "device"), kept, form, strict=True):
            if has != given:
                raise ValueError(
                    f"past_key_values does not fit adapter {adapter!r} of layer {layer_key!r}: its {what} is {has} "
                    f"there and {given} here"
                )

    def append(self, kv: Tensor, max_length: int) -> None:
        """At least `max_length` places are made where places are made."""
        past, total = self.length, self.length + kv.shape[1]
        if torch.is_grad_enabled() or transformed():
            # Autograd may hold on to any of these, so nothing is written into; nor can torch.func's transforms.
            self.kv = torch.cat([self.kv[:, :past], kv], 1) if past else kv
            self.owned, self.recorded = False, torch.is_grad_enabled()
        else:
            self.grow(kv.shape[1], max_length)[:, past:total] = kv
        self.length = total

    def grow(self, time: int, max_length: int) -> Tensor:
        """The buffer, with room for `time` more tokens that may be written."""
        past, total = self.length, self.length + time
        if total > self.kv.shape[1] or not self._writable():
            self.kv = _grown(self.kv, past, max(total, max_length, 2 * self.kv.shape[1] if past else 0))
            self.owned = True
            if max_length and not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.kv)  # as transformers does: a graph then may write into it
        return self.kv

    def _writable(self) -> bool:
        if torch.compiler.is_compiling():  # the rest cannot be traced; where it matters torch raises
            return self.owned
        return self.owned and (torch.is_inference_mode_enabled() or not self.kv.is_inference())


def _form(kv: Tensor) -> Form:
    return kv.shape[0], kv.shape[2], kv.dtype, kv.device


def _grown(old: Tensor, length: int, capacity: int) -> Tensor:
    new = old.new_empty(old.shape[0], capacity, old.shape[2])
    new[:, :length] = old[:, :length].detach()
    return new


class AdapterCache:
    """What all adapters keep beside one model cache: keys and values, side by side, under (layer, adapter).

    Without gradients they are written into buffers that double when full, or, for a static cache, have its whole length
    from the start. Where gradients are recorded nothing is written into, and tensors are concatenated; a past that was
    made so is refused, for no gradient would flow into it. Nothing here waits for the device.
    """

    def __init__(self, tokens: int, max_length: int, counter: int | None = 0) -> None:
        # The length of a static cache is a tensor; reading it would wait for the device, so it is counted here too. It
        # is not (None) behind steps that may be replayed without this code: they count on the device alone. From the
        # first of these on (`replayed`) there may have been replays at any time, and the count is only what is known.
        self.tokens: int | None = tokens
        self.replayed = False
        # The model's layer whose updates are counted. None: no layer of the cache knows how many tokens it has seen, as
        # where all are state spaces; then the tokens of every forward are counted, and nothing else.
        self.counter = counter
        self.max_length = max_length
        self.packed: Tensor | None = None
        self._entries: dict[tuple[str, str], _Entry] = {}

    def length(self, layer_key: str, adapter: str) -> int:
        """The number of past tokens kept for one adapter of one layer."""
        entry = self._entries.get((layer_key, adapter))
        return 0 if entry is None else entry.length

    def count_forward(self, time: int) -> None:
        """A forward of `time` tokens begins, whose past has been read."""
        if self.counter is None:
            self.tokens += time

    def leave_count(self) -> None:
        """From here on the tokens are counted on the device alone."""
        self.tokens, self.replayed = None, True

    def count(self, tokens: int) -> None:
        """Goes on counting here what was counted on the device alone: of what had as many tokens as was known here."""
        for entry in self._entries.values():
            if entry.length is None or entry.length == self.tokens:
                entry.length = tokens
        self.tokens = tokens

    def check(self, wanted: Iterable[tuple[str, str]], past: int) -> None:
        """Raises ValueError unless every (layer, adapter) in `wanted` has exactly `past` tokens here."""
        for layer_key, adapter in wanted:
            length = self.length(layer_key, adapter)
            if length != past:
                raise ValueError(
                    f"past_key_values holds {past} tokens, but {length} tokens of adapter {adapter!r} of layer "
                    f"{layer_key!r}: it was filled by another model, while the adapter was disabled or not active, or "
                    "by a compiled forward with gradients. Give a cache that this model filled with the same "
                    "adapters, or an empty one"
                )

    def past(self, layer_key: str, adapter: str, past: int, new: Tensor) -> Tensor | None:
        """What is kept of the `past` tokens before this forward, [batch, past, width], not to be written into; or None.

        Args:
            layer_key, adapter, past: as in :meth:`keep`.
            new: [batch, any, width] in the dtype and on the device of what :meth:`keep` will be given.

        Raises:
            ValueError: what is kept does not fit, or was kept for a gradient that would be lost.
        """
        entry = self._checked(layer_key, adapter, past)
        if entry is None:
            return None
        entry.require(_form(new), layer_key, adapter)
        if entry.recorded and torch.is_grad_enabled():
            raise ValueError(
                "past_key_values was filled while gradients were recorded, and none flow into what adapter "
                f"{adapter!r} keeps of past tokens: fill it under torch.no_grad(), or train on whole sequences"
            )
        return entry.kv[:, :past]

    def keep(self, layer_key: str, adapter: str, kv: Tensor, *, past: int) -> None:
        """Keeps the new keys and values of one adapter of one layer.

        Args:
            layer_key: any name of the layer that is unique in the model.
            adapter: the adapter's name.
            kv: [batch, time, width] floating point, of the new tokens. Copied, but where gradients are recorded.
            past: the number of tokens in the model's cache before this forward.

        Raises:
            ValueError: what is kept has another length, batch size, rank, dtype or device. Nothing is changed then.
        """
        if kv.dim() != 3:
            raise ValueError(f"kv must be [batch, time, width], got {list(kv.shape)}")
        form = _form(kv)
        entry = self._checked(layer_key, adapter, past)
        if entry is None or (not past and entry.form != form):
            entry = _Entry(*form)
        else:
            entry.require(form, layer_key, adapter)
        entry.append(kv, self.max_length)
        self._entries[layer_key, adapter] = entry

    def _checked(self, layer_key: str, adapter: str, past: int) -> _Entry | None:
        """The entry, holding `past` tokens."""
        entry = self._entries.get((layer_key, adapter))
        if entry is not None and entry.length is None:
            entry.length = past
        if (0 if entry is None else entry.length) != past:
            self.check(((layer_key, adapter),), past)
        return entry

    def room(self, layer_key: str, adapter: str, form: Form, *, past: int) -> Tensor:
        """For a kernel that writes one new token itself: a buffer [batch, capacity, width], filled up to `past`.

        The token counts as kept from now on. Not for where gradients are recorded.

        Args:
            layer_key, adapter, past: as in :meth:`keep`.
            form: of the new token.

        Raises:
            ValueError: as :meth:`keep`.
        """
        entry = self._checked(layer_key, adapter, past)
        if entry is None or (not past and entry.form != form):
            entry = self._entries[layer_key, adapter] = _Entry(*form)
        else:
            entry.require(form, layer_key, adapter)
        kv = entry.grow(1, self.max_length)
        entry.length += 1
        return kv

    def static_dtype(self, wanted: Iterable[tuple[str, str]]) -> torch.dtype | None:
        """The dtype of what :meth:`place` can give for all of `wanted`; None where some have no whole buffer.

        Nor where some lack tokens that the model's cache has. A graph of torch.compile does not look, for it would be
        made again when the count goes over to the device.
        """
        entries, tracing = [self._entries.get(key) for key in wanted], torch.compiler.is_compiling()
        whole = [
            e is not None and e.owned and e.kv.shape[1] == self.max_length and (tracing or e.length == self.tokens)
            for e in entries
        ]
        return entries[0].kv.dtype if whole and all(whole) and self.packed is None else None

    def place(self, layer_key: str, adapter: str, form: Form) -> Tensor:
        """As :meth:`room` for a static cache, whose length is read on the device when a kernel runs, and not here."""
        entry = self._entries[layer_key, adapter]
        entry.require(form, layer_key, adapter)
        entry.length = None
        return entry.kv

    def map(self, change) -> None:
        """Replaces every buffer [batch, capacity, width] by `change` of it."""
        for entry in self._entries.values():
            entry.kv = change(entry.kv)

    def crop(self, length: int) -> None:
        """Forgets all but the first `length` tokens; buffers of a static cache stay where they are."""
        for key, entry in list(self._entries.items()):
            entry.length = length if entry.length is None else min(entry.length, length)
            if entry.length:
                continue
            entry.recorded = False
            if not self.max_length:
                del self._entries[key]


class _Adopted(Swapped):
    """What a cache does more once it is adopted: the base class first, which raises where it cannot."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self.gci_adapters.counter and self.gci_adapters.tokens is not None:
            self.gci_adapters.tokens += key_states.shape[-2]
        return result

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.gci_adapters.map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def crop(self, *args, **kwargs) -> None:
        # What the argument means has changed between versions of transformers; the length it leaves has not.
        super().crop(*args, **kwargs)
        kept = self.gci_adapters
        if kept.counter is None:  # layers that know no length take a number of tokens to remove, which is negative
            kept.tokens = max(0, kept.tokens - abs(next(iter((*args, *kwargs.values())))))
        else:
            kept.tokens = int(self.get_seq_length())
        kept.crop(kept.tokens)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.gci_adapters.map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.gci_adapters.map(lambda t: t[indices, ...])

    def reset(self) -> None:
        super().reset()
        self.gci_adapters.tokens = 0
        self.gci_adapters.packed = None
        self.gci_adapters.crop(0)


def length(cache: Cache) -> int:
    """The number of tokens in a model's cache; waits for the device only if it is a static one that counts there.

    Raises:
        ValueError: it holds the state of tokens that no attached model has seen, and cannot say of how many.
    """
    if isinstance(cache, _Adopted) and cache.gci_adapters.counter is None:
        return cache.gci_adapters.tokens
    if _counter(cache) is None:
        states = [layer.has_previous_state for layer in cache.layers if hasattr(layer, "has_previous_state")]
        if any(any(state.values()) for state in states):
            raise ValueError(
                "past_key_values holds a state that was made before the adapter was added, and cannot tell of how many "
                "tokens; give an empty cache"
            )
        return 0
    tokens = cache.get_seq_length()
    if not isinstance(tokens, Tensor):
        return tokens
    if not isinstance(cache, _Adopted):
        return int(tokens)
    if cache.gci_adapters.tokens is None or cache.gci_adapters.replayed:
        cache.gci_adapters.count(int(tokens))
    return cache.gci_adapters.tokens


def _counter(cache: Cache) -> int | None:
    """The layer of a model's cache whose length get_seq_length() gives; None where no layer has one."""
    if not cache.layers or isinstance(cache.layers[0], CacheLayerMixin):
        return 0
    return next((i for i, layer in enumerate(cache.layers) if isinstance(layer, CacheLayerMixin)), None)


def position(cache: Cache) -> Tensor | None:
    """The number of tokens in a static cache when this runs, int32 [1] on its device; None for other caches."""
    layer = next((layer for layer in cache.layers if type(layer) is StaticLayer and layer.is_initialized), None)
    return None if layer is None else layer.cumulative_length.to(torch.int32).view(1)


def obstacle(cache: Cache) -> str | None:
    """Why no adapter can keep its keys and values beside `cache`, or None."""
    if isinstance(cache, _Adopted):
        return None
    kind = type(cache)
    # Models may have a class of their own, derived from these, that holds more.
    own = kind.__module__.startswith("transformers.models.") and issubclass(kind, (DynamicCache, StaticCache))
    if kind not in (DynamicCache, StaticCache) and not own:
        return f"past_key_values is a {kind.__name__}; adapters can keep theirs beside {ALLOWED}"
    if cache.offloading:
        return f"past_key_values is a {kind.__name__} with offloading; adapters can keep theirs beside {ALLOWED}"
    others = {type(layer).__name__ for layer in cache.layers if not _is_known(type(layer))}
    if others:
        return (
            f"past_key_values has layers of {sorted(others)}; adapters can keep theirs beside the dynamic and static "
            "layers of transformers"
        )
    return None


def _is_known(layer: type) -> bool:
    if not layer.__module__.startswith("transformers."):
        return False
    return not any(base.__name__ in _STORED_OTHERWISE for base in layer.__mro__)


def adopt(cache: Cache) -> AdapterCache:
    """The :class:`AdapterCache` that rides with `cache`, made at the first call.

    To be called between two forwards of the model, or at the start of one before its first attention.

    Raises:
        TypeError: the cache is of a kind that is not supported; see :func:`obstacle`.
    """
    if not isinstance(cache, _Adopted):
        if (reason := obstacle(cache)) is not None:
            raise TypeError(reason)
        _swap(cache)
    return cache.gci_adapters


@torch.compiler.disable
def _swap(cache: Cache) -> None:
    layers = [layer for layer in cache.layers if isinstance(layer, StaticLayer)]
    full = [layer.max_cache_len for layer in layers if not isinstance(layer, StaticSlidingWindowLayer)]
    cache.gci_adapters = AdapterCache(length(cache), max(full, default=0), _counter(cache))
    cache.__class__ = subclass(type(cache), _Adopted)
