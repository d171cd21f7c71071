"""A model's key-value cache with the adapters' keys and values beside it.

They are an attribute of the model's `Cache` object: :func:`get_or_create` gives the instance a subclass of its own
class, whose methods do what the class did and then the same to the adapters' tensors. So whatever generate() or a user
does to the cache (reorder_cache in beam search, crop in assisted decoding, batch_repeat_interleave,
batch_select_indices, reset, deepcopy, pickle) is done to both, and freeing the cache frees both. Two alternatives were
rejected: another entry in `cache.layers` is taken for a layer of the model (a DynamicCache without a config appends its
layers at their first write, and len(), get_max_length() and is_sliding would count ours), and a dictionary outside of
the cache would miss reorder_cache and deepcopy.

The class is changed once for each cache. torch.compile cannot trace that, so the graph breaks there; it does not in
later steps of generation, where the cache already has the class.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import CacheLayerMixin, StaticLayer, StaticSlidingWindowLayer

from gci_kernels.class_swap import Swapped, add_mixin
from gci_kernels.generation.adapter_cache import AdapterCache

#: For error messages: the caches that adapters can store theirs beside.
SUPPORTED = "DynamicCache and StaticCache without offloading"
_QUANTIZED = ("QuantizedLayer", "BaseQuantizedLayer")  # layers of a QuantizedCache, in versions that have them


class _CacheWithAdapters(Swapped):
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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.gci_adapters.map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        # What the argument means has changed between versions of transformers; the length it leaves has not.
        super().crop(*args, **kwargs)
        adapters = self.gci_adapters
        if adapters.counting_layer is None:
            # Layers that know no length take a number of tokens to remove, which is negative.
            left = max(0, length(self) - abs(next(iter((*args, *kwargs.values())))))
        else:
            left = int(self.get_seq_length())
        adapters.tokens = left
        adapters.crop(left)

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


def length(cache: Any) -> int:
    """The number of tokens in a model's cache; waits for the device only if it is a static one that counts there.

    Raises:
        ValueError: it holds the state of tokens that no attached model has seen, and does not know of how many.
    """
    adapters = find(cache)
    if adapters is not None and adapters.counting_layer is None and adapters.tokens is not None:
        return adapters.tokens
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
