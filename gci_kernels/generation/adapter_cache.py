"""Keys and values of an adapter's own attention, stored beside the model's key-value cache in generation.

They are an attribute of the model's `Cache` object: :func:`get_or_create` gives the instance a subclass of its own
class, whose methods do what the class did and then the same to the adapters' tensors. So whatever generate() or a user
does to the cache (reorder_cache in beam search, crop in assisted decoding, batch_repeat_interleave,
batch_select_indices, reset, deepcopy, pickle) is done to both, and freeing the cache frees both. Two alternatives were
rejected: another entry in `cache.layers` is taken for a layer of the model (a DynamicCache without a config appends its
layers at their first write, and len(), get_max_length() and is_sliding would count ours), and a dictionary outside of
the cache is told neither of reorder_cache nor of deepcopy.

The class is changed once for each cache. torch.compile cannot trace that, so the graph breaks there; it does not in
later steps of generation, where the cache already has the class.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from gci_kernels.class_swap import Swapped, add_mixin
from gci_kernels.ops.transforms import transformed

#: For error messages: the caches that adapters can store theirs beside.
SUPPORTED = "DynamicCache and StaticCache without offloading"
_QUANTIZED = ("QuantizedLayer", "BaseQuantizedLayer")  # layers of a QuantizedCache, in versions that have them

KVSpec = tuple[int, int, torch.dtype, torch.device]  # of an adapter's keys and values: batch size, width, dtype, device


class _Entry:
    """Past tokens of one adapter of one layer: a buffer [batch, capacity, width], filled up to `length`."""

    def __init__(self, batch: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.kv = torch.empty(batch, 0, width, dtype=dtype, device=device)
        self.length: int | None = 0  # None: as long as the model's cache, whose length only the device knows
        self.exclusive = False  # whether no other tensor shares the buffer, so that its unfilled part may be written
        self.with_gradients = False  # whether some of it was computed while gradients were recorded

    def append(self, kv: Tensor, past: int, max_length: int) -> None:
        """Stores kv [batch, time, width] behind the first `past` tokens; a new buffer has at least `max_length`."""
        total = past + kv.shape[1]
        if torch.is_grad_enabled() or transformed():
            # Autograd may need any of these tensors, so none is written in place; nor can torch.func's transforms.
            self.kv = torch.cat([self.kv[:, :past], kv], 1) if past else kv
            self.exclusive, self.with_gradients = False, torch.is_grad_enabled()
        else:
            self.reserve(past, total, max_length)[:, past:total] = kv
        self.length = total

    def reserve(self, past: int, total: int, max_length: int) -> Tensor:
        """The buffer, with a capacity of at least `total` tokens; those after the first `past` may be written."""
        # torch.compile cannot trace is_inference(); where that matters, torch raises.
        outside = not (is_dynamo_compiling() or torch.is_inference_mode_enabled())
        if total > self.kv.shape[1] or not self.exclusive or outside and self.kv.is_inference():
            self._reallocate(past, max(total, max_length, 2 * self.kv.shape[1] if past else 0))
            if max_length and not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.kv)  # as transformers does: CUDA graphs may then write to it
        return self.kv

    def _reallocate(self, length: int, capacity: int) -> None:
        old = self.kv
        self.kv = old.new_empty(old.shape[0], capacity, old.shape[2])
        self.kv[:, :length] = old[:, :length].detach()
        self.exclusive = True


def _spec(kv: Tensor) -> KVSpec:
    return kv.shape[0], kv.shape[2], kv.dtype, kv.device


def _misfit(stored: KVSpec, new: KVSpec, layer_key: str, adapter: str) -> ValueError:
    pairs = zip(("batch size", "width", "dtype", "device"), stored, new, strict=True)
    name, has, given = next(each for each in pairs if each[1] != each[2])
    return ValueError(
        f"past_key_values does not fit adapter {adapter!r} of layer {layer_key!r}: its {name} is {has} there and "
        f"{given} here"
    )


class AdapterCache:
    """What all adapters store beside one model cache: keys and values, concatenated, under (layer, adapter).

    Without gradients they are written into buffers that double when full, or that have a static cache's whole length
    from the start. Where gradients are recorded nothing is written in place and tensors are concatenated; a past that
    was stored so is refused in training, for it would get no gradient. Nothing here waits for the device.

    Attributes:
        tokens: how many tokens the model's cache holds, counted here because the length of a static cache is a tensor,
            and reading it waits for the device. None: unknown here, after decoding steps that may be replayed as a
            graph without running this code; the cache's own length on the device is right.
        replayed: whether there have been such steps. From the first one on there may have been replays at any time,
            and `tokens` has to be read from the device before it is used.
        counting_layer: the number of the model's layer whose updates are counted. None where no layer of the cache
            knows how many tokens it has seen, as where all are state spaces: then every forward's tokens are counted.
        max_length: the capacity of a static cache in tokens, 0 for others.
        packed: segments of packed sequences that the cache holds, int32 [batch, tokens], or None.
    """

    def __init__(self, tokens: int, max_length: int, counting_layer: int | None = 0) -> None:
        self.tokens: int | None = tokens
        self.replayed = False
        self.counting_layer = counting_layer
        self.max_length = max_length
        self.packed: Tensor | None = None
        self._entries: dict[tuple[str, str], _Entry] = {}

    def add_tokens(self, count: int) -> None:
        """Counts `count` new tokens, unless the tokens are counted on the device."""
        if self.tokens is not None:
            self.tokens += count

    def begin_forward(self, time: int) -> None:
        """Counts the `time` tokens of a forward that begins, where no layer does; its past has been read."""
        if self.counting_layer is None:
            self.add_tokens(time)

    def stop_counting(self) -> None:
        """From here on the tokens are counted on the device alone."""
        self.tokens, self.replayed = None, True

    def resume_counting(self, tokens: int) -> int:
        """Sets the number of tokens, as read from the device, here and for all entries that missed none; returns it."""
        for entry in self._entries.values():
            if entry.length is None or entry.length == self.tokens:
                entry.length = tokens
        self.tokens = tokens
        return tokens

    def check(self, entries: Iterable[tuple[str, str]], past: int) -> None:
        """Checks that every (layer, adapter) in `entries` has exactly `past` tokens here.

        Raises:
            ValueError: one has not.
        """
        for layer_key, adapter in entries:
            entry = self._entries.get((layer_key, adapter))
            length = 0 if entry is None else entry.length
            if length != past:
                raise ValueError(
                    f"past_key_values holds {past} tokens, but {length} tokens of adapter {adapter!r} of layer "
                    f"{layer_key!r}: it was filled by another model, while the adapter was disabled or not active, or "
                    "by a compiled forward with gradients. Give a cache that this model filled with the same "
                    "adapters, or an empty one"
                )

    def past(self, layer_key: str, adapter: str, past: int, new: Tensor) -> Tensor | None:
        """What is stored of the `past` tokens before this forward, [batch, past, width]; None: nothing. Read-only.

        Args:
            layer_key, adapter, past: as in :meth:`keep`.
            new: [batch, any, width] in the dtype and on the device of what :meth:`keep` will be given.

        Raises:
            ValueError: what is stored does not fit, or was stored for a gradient that would be lost.
        """
        entry = self._entry(layer_key, adapter, past)
        if entry is None:
            return None
        if (stored := _spec(entry.kv)) != (given := _spec(new)):
            raise _misfit(stored, given, layer_key, adapter)
        if entry.with_gradients and torch.is_grad_enabled():
            raise ValueError(
                "past_key_values was filled while gradients were recorded, and none flow into what adapter "
                f"{adapter!r} keeps of past tokens: fill it under torch.no_grad(), or train on whole sequences"
            )
        return entry.kv[:, :past]

    def keep(self, layer_key: str, adapter: str, kv: Tensor, *, past: int) -> None:
        """Stores the new keys and values of one adapter of one layer.

        Args:
            layer_key: any name of the layer that is unique in the model.
            adapter: the adapter's name.
            kv: [batch, time, width] floating point, of the new tokens. Copied, except where gradients are recorded.
            past: the number of tokens in the model's cache before this forward.

        Raises:
            ValueError: what is stored has another length, batch size, width, dtype or device. Nothing is changed then.
        """
        if kv.dim() != 3:
            raise ValueError(f"kv must be [batch, time, width], got {list(kv.shape)}")
        self._entry_to_extend(layer_key, adapter, _spec(kv), past).append(kv, past, self.max_length)

    def reserve(self, layer_key: str, adapter: str, spec: KVSpec, *, past: int) -> Tensor:
        """For a kernel that writes one new token itself: a buffer [batch, capacity, width], filled up to `past`.

        The token counts as stored from now on. Not for use where gradients are recorded.

        Args:
            layer_key, adapter, past: as in :meth:`keep`.
            spec: of the new token.

        Raises:
            ValueError: as :meth:`keep`.
        """
        # Every layer calls this in every decoding step: an entry that has room is found without another Python call.
        entry = self._entries.get((layer_key, adapter))
        if entry is not None and entry.exclusive and entry.length == past < entry.kv.shape[1]:
            kv = entry.kv
            writable = is_dynamo_compiling() or torch.is_inference_mode_enabled() or not kv.is_inference()
            if writable and (kv.shape[0], kv.shape[2], kv.dtype, kv.device) == spec:
                entry.length = past + 1
                return kv
        entry = self._entry_to_extend(layer_key, adapter, spec, past)
        kv = entry.reserve(past, past + 1, self.max_length)
        entry.length = past + 1
        return kv

    def _entry(self, layer_key: str, adapter: str, past: int) -> _Entry | None:
        """The entry; it holds `past` tokens. None where there is none and `past` is 0."""
        entry = self._entries.get((layer_key, adapter))
        if entry is not None and entry.length is None:
            entry.length = past
        if (0 if entry is None else entry.length) != past:
            self.check(((layer_key, adapter),), past)
        return entry

    def _entry_to_extend(self, layer_key: str, adapter: str, spec: KVSpec, past: int) -> _Entry:
        """The entry, of `past` tokens like `spec`; a new one where there is none, or an empty one of another spec."""
        entry = self._entry(layer_key, adapter, past)
        if entry is not None and (stored := _spec(entry.kv)) != spec:
            if past:
                raise _misfit(stored, spec, layer_key, adapter)
            entry = None
        if entry is None:
            entry = self._entries[layer_key, adapter] = _Entry(*spec)
        return entry

    def static_dtype(self, entries: Iterable[tuple[str, str]]) -> torch.dtype | None:
        """The dtype of what :meth:`reserve_static` can give for all of `entries`; None where it cannot for some.

        It needs a buffer of the static cache's whole length, and no token may be missing there that the model's cache
        has. The latter is not looked at in torch.compile, which would compile again once the device counts.
        """
        found, tracing = [self._entries.get(key) for key in entries], torch.compiler.is_compiling()
        complete = [
            e is not None and e.exclusive and e.kv.shape[1] == self.max_length and (tracing or e.length == self.tokens)
            for e in found
        ]
        if not complete or not all(complete) or self.packed is not None or found[0] is None:
            return None
        return found[0].kv.dtype

    def reserve_static(self, layer_key: str, adapter: str, spec: KVSpec) -> Tensor:
        """As :meth:`reserve`, for a static cache whose length the kernel reads on the device when it runs."""
        entry = self._entries[layer_key, adapter]
        if (stored := _spec(entry.kv)) != spec:
            raise _misfit(stored, spec, layer_key, adapter)
        entry.length = None
        return entry.kv

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces every buffer [batch, capacity, width] by `change` of it."""
        for entry in self._entries.values():
            entry.kv = change(entry.kv)

    def crop(self, length: int) -> None:
        """Drops all but the first `length` tokens; buffers of a static cache keep their addresses."""
        for key, entry in list(self._entries.items()):
            entry.length = length if entry.length is None else min(entry.length, length)
            if entry.length:
                continue
            entry.with_gradients = False
            if not self.max_length:
                del self._entries[key]


if TYPE_CHECKING:  # what the mixin is mixed with
    _Cache = Cache
else:
    _Cache = object


class _CacheWithAdapters(Swapped, _Cache):
    """Mixin for the class of a model's cache, whose own methods run first, and raise where they cannot."""

    gci_adapters: AdapterCache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        adapters = self.gci_adapters
        if layer_idx == adapters.counting_layer:
            adapters.add_tokens(key_states.shape[-2])
        return result

    def reorder_cache(self, beam_idx: Tensor) -> None:  # type: ignore[override]  # there a LongTensor
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.gci_adapters.map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        # What the argument means has changed between versions of transformers; the length it leaves has not.
        super().crop(*args, **kwargs)
        adapters = self.gci_adapters
        if adapters.counting_layer is None:
            # Layers that know no length take a number of tokens to remove, which is negative.
            length = max(0, _counted(adapters) - abs(next(iter((*args, *kwargs.values())))))
        else:
            length = int(self.get_seq_length())
        adapters.tokens = length
        adapters.crop(length)

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


def _counted(adapters: AdapterCache) -> int:
    """The tokens of a cache without a length of its own, which no step counts on the device."""
    assert adapters.tokens is not None
    return adapters.tokens


def length(cache: Cache) -> int:
    """The number of tokens in a model's cache; waits for the device only if it is a static one that counts there.

    Raises:
        ValueError: it holds the state of tokens that no attached model has seen, and does not know of how many.
    """
    adapters = find(cache)
    if adapters is not None and adapters.counting_layer is None:
        return _counted(adapters)
    if _counting_layer(cache) is None:
        states = [layer.has_previous_state for layer in cache.layers if hasattr(layer, "has_previous_state")]
        if any(any(state.values()) for state in states):
            raise ValueError(
                "past_key_values holds a state that was made before the adapter was added, and cannot tell of how many "
                "tokens; give an empty cache"
            )
        return 0
    tokens: int | Tensor = cache.get_seq_length()
    if not isinstance(tokens, Tensor):
        return tokens
    if adapters is None:
        return int(tokens)
    if adapters.tokens is None or adapters.replayed:
        return adapters.resume_counting(int(tokens))
    return adapters.tokens


def _counting_layer(cache: Cache) -> int | None:
    """The layer of a model's cache whose length get_seq_length() gives; None where no layer has one."""
    if not cache.layers or isinstance(cache.layers[0], CacheLayerMixin):
        return 0
    return next((i for i, layer in enumerate(cache.layers) if isinstance(layer, CacheLayerMixin)), None)


def length_on_device(cache: Cache) -> Tensor | None:
    """The number of tokens in a static cache when this runs, int32 [1] on its device; None for other caches."""
    layer = next((layer for layer in cache.layers if type(layer) is StaticLayer and layer.is_initialized), None)
    return None if layer is None else layer.cumulative_length.to(torch.int32).view(1)


def obstacle(cache: Cache) -> str | None:
    """Why no adapter can store its keys and values beside `cache`, or None."""
    if isinstance(cache, _CacheWithAdapters):
        return None
    kind = type(cache)
    # Models may have a class of their own, derived from these, that holds more.
    own = kind.__module__.startswith("transformers.models.") and issubclass(kind, (DynamicCache, StaticCache))
    if kind not in (DynamicCache, StaticCache) and not own:
        return f"past_key_values is a {kind.__name__}; adapters can keep theirs beside {SUPPORTED}"
    if cache.offloading:
        return f"past_key_values is a {kind.__name__} with offloading; adapters can keep theirs beside {SUPPORTED}"
    others = {type(layer).__name__ for layer in cache.layers if not _is_supported(type(layer))}
    if others:
        return (
            f"past_key_values has layers of {sorted(others)}; adapters can keep theirs beside the dynamic and static "
            "layers of transformers"
        )
    return None


def _is_supported(layer: type) -> bool:
    if not layer.__module__.startswith("transformers."):
        return False
    return not any(base.__name__ in _QUANTIZED for base in layer.__mro__)


def find(cache: object) -> AdapterCache | None:
    """The :class:`AdapterCache` of a model's cache, None where it has none yet."""
    return cache.gci_adapters if isinstance(cache, _CacheWithAdapters) else None


def get_or_create(cache: Cache) -> AdapterCache:
    """The :class:`AdapterCache` of a model's cache, created at the first call.

    To be called between two forwards of the model, or at the start of one before its first attention.

    Raises:
        TypeError: the cache is of a kind that is not supported; see :func:`obstacle`.
    """
    if not isinstance(cache, _CacheWithAdapters):
        if (reason := obstacle(cache)) is not None:
            raise TypeError(reason)
        return _create(cache)
    return cache.gci_adapters


@torch.compiler.disable
def _create(cache: Any) -> AdapterCache:
    layers = [layer for layer in cache.layers if isinstance(layer, StaticLayer)]
    full = [layer.max_cache_len for layer in layers if not isinstance(layer, StaticSlidingWindowLayer)]
    adapters = cache.gci_adapters = AdapterCache(length(cache), max(full, default=0), _counting_layer(cache))
    add_mixin(cache, _CacheWithAdapters)
    return adapters
