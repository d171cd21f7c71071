"""Finds the cache among the arguments of a model's forward, whatever it is called and whatever it is."""

from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from gci_kernels.generation.adapter_cache import ALLOWED

# What models call a cache or a state, where it is none of transformers' Cache.
_NAMES = {
    "cache", "past", "past_key_value", "layer_past", "kv_cache", "cache_params", "past_buckets_states", "mems", "state",
    "block_table", "page_table", "read_index", "write_index",
}  # fmt: skip
_PLAIN = (Tensor, bool, int, float, str, dict, list, tuple)


def find(given: dict) -> tuple[Cache | None, str | None]:
    """The cache among the arguments of a forward, and why no adapter can keep anything beside one that is there.

    Continuous batching gives its paged cache under a name of its own, and older models give lists of tensors.
    """
    cache = given.get("past_key_values")
    if cache is not None and not isinstance(cache, Cache):
        return None, f"past_key_values must be a transformers Cache, got {type(cache).__name__}"
    for name, value in given.items():
        if value is None or value is cache:
            continue
        if isinstance(value, Cache):
            cache = value if cache is None else cache
        elif (name in _NAMES and not isinstance(value, bool)) or _is_cache(value):
            return cache, f"{name} is a {type(value).__name__}; adapters can keep theirs beside {ALLOWED}"
    return unwrapped(cache), None


def _is_cache(value: object) -> bool:
    if isinstance(value, _PLAIN):
        return False
    return "cache" in type(value).__name__.lower() or hasattr(value, "get_seq_length")


def unwrapped(cache: Cache | None) -> Cache | None:
    """Of a decoder's cache with that of its cross-attention, the decoder's own."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
