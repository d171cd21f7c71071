"""What the arguments of a model's forward say: its cache, whatever the argument is called, and its sequences."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache

from gci_kernels.generation.direction import check_mask
from gci_kernels.generation.model_cache import SUPPORTED
from gci_kernels.ops.attention import Sequence
from gci_kernels.ops.attention.sequence import assert_on_device, may_read

# What models call a cache or a state, where it is none of transformers' Cache.
_NAMES = {
    "cache", "past", "past_key_value", "layer_past", "kv_cache", "cache_params", "past_buckets_states", "mems", "state",
    "block_table", "page_table", "read_index", "write_index",
}  # fmt: skip
_PLAIN = (Tensor, bool, int, float, str, dict, list, tuple)

_CUSTOM_MASK = (
    "attention_mask: a 4-D mask must be causal with padded keys left out, as transformers makes it for a static cache; "
    "custom masks, biases and sliding windows are not supported. Give the 2-D mask [batch, keys]"
)


def find_cache(arguments: Mapping[str, Any]) -> tuple[Cache | None, str | None]:
    """The cache among the arguments of a forward, and why no adapter can store anything beside one that is there.

    Continuous batching gives its paged cache under a name of its own, and older models give lists of tensors.

    Args:
        arguments: of the forward, by name.
    """
    cache = arguments.get("past_key_values")
    if cache is not None and not isinstance(cache, Cache):
        return None, f"past_key_values must be a transformers Cache, got {type(cache).__name__}"
    for name, value in arguments.items():
        if value is None or value is cache:
            continue
        if isinstance(value, Cache):
            cache = value if cache is None else cache
        elif (name in _NAMES and not isinstance(value, bool)) or (
            not isinstance(value, _PLAIN)
            and ("cache" in type(value).__name__.lower() or hasattr(value, "get_seq_length"))
        ):
            return cache, f"{name} is a {type(value).__name__}; adapters can keep theirs beside {SUPPORTED}"
    return None if cache is None else decoder_cache(cache), None


def decoder_cache(cache: Cache) -> Cache:
    """The decoder's own cache, of one that holds that of its cross-attention too; other caches are returned as is."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def takes_packed_positions(backbone: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether position_ids that start again are packed sequences to the model; beside a cache they are not.

    transformers' masks are made so; its flash attention looks at the positions alone.

    Args:
        backbone: the model, in training or evaluation mode.
        arguments: of its forward, by name.
    """
    config: Any = backbone.config
    if "flash" in (getattr(config, "_attn_implementation", None) or ""):
        return True
    if arguments.get("past_key_values") is not None:
        return False
    use_cache = arguments.get("use_cache")
    use_cache = getattr(config, "use_cache", False) if use_cache is None else use_cache
    return not use_cache or (backbone.training and bool(getattr(backbone, "gradient_checkpointing", False)))


def full_attention_mask(mask: Any) -> Any:
    """The mask among those for each type of layer, if `mask` is a dictionary of them, that hides padding alone.

    Raises:
        ValueError: it has none for full_attention.
    """
    if not isinstance(mask, dict):
        return mask
    if "full_attention" not in mask:
        raise ValueError(f"attention_mask has masks for {sorted(mask)}, but none for full_attention")
    return mask["full_attention"]


def is_key_mask(mask: object, batch: int) -> bool:
    """Whether shape and dtype of the mask of a single query show that it says which keys are seen, and no more.

    A floating-point mask may hold a bias as well; its values have to be read to know.
    """
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.shape[0] not in (1, batch):
        return False
    return mask.dim() == 2 or (mask.dim() == 4 and mask.shape[1:3] == (1, 1))


def segments_from_key_mask(mask: Tensor, batch: int, capacity: int) -> Tensor:
    """Segments of the keys that a single query attends to, int32 [batch, at least capacity], on the mask's device.

    A kernel that is replayed as part of a graph also reads the segments of tokens that came after the mask; there they
    are padding.

    Args:
        mask: of which :func:`is_key_mask` holds.
        capacity: of the cache, in tokens.
    """
    segments = (mask if mask.dim() == 2 else mask[:, 0, 0]).bool().expand(batch, -1).int() - 1
    missing = capacity - segments.shape[1]
    return segments if missing <= 0 else torch.nn.functional.pad(segments, (0, missing), value=-1)


def sequence_from_mask(mask: Any, batch: int, time: int, past: int, device: torch.device) -> Sequence:
    """The sequences of a batch of `time` new tokens behind `past`; segments on `device`.

    Args:
        mask: [batch or 1, at least past + time], or [batch or 1, 1, time, at least past + time] as transformers makes
            it from that.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        found = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be [batch, keys] or as transformers makes it from that, got {found}")
    keys = past + time
    if mask.shape[0] not in (1, batch) or mask.shape[-1] < keys:
        raise ValueError(f"attention_mask must be at least [{batch}, {keys}], got {list(mask.shape)}")
    if mask.dim() == 4:
        mask = _key_mask(mask, time, past)
    # The mask of a static cache has the cache's capacity; what lies behind `keys` is not there yet.
    mask = mask[:, :keys].expand(batch, -1).to(device)
    if torch.compiler.is_compiling():  # from_mask reads the values, which would break the graph
        return Sequence(mask.bool().int() - 1, past)
    return Sequence.from_mask(mask, past)


def _key_mask(mask: Tensor, time: int, past: int) -> Tensor:
    """The 2-D mask, bool [batch, keys], from which transformers made `mask` [batch, 1, time, >= keys].

    The last query attends to every key that is not padded. More queries could have been given any mask, so for them
    `mask` is compared with what follows from the 2-D one, on a GPU by the GPU, for which nothing waits; a single query,
    as in decoding, cannot tell a custom mask from padding, and need not.
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
        # A padded query attends to nothing, or, where that would be NaN, to whatever transformers lets it.
        same = ((allowed == expected) | ~expected.any(-1, keepdim=True)).all()
        if floating:
            same &= ((mask == 0) | (mask <= torch.finfo(mask.dtype).min)).all()
        readable = may_read(same)
        if not (readable and bool(same)):
            if not past:
                check_mask(mask, unpadded.int() - 1, mask.shape[0], time)  # its message fits better if it looks ahead
            if readable:
                raise ValueError(_CUSTOM_MASK)
            assert_on_device(same, _CUSTOM_MASK)
    return unpadded


def sequence_from_positions(arguments: Mapping[str, Any], batch: int, time: int, past: int, packs: bool) -> Sequence:
    """The sequences of a batch without a mask: packed ones, by cu_seq_lens_q or by position_ids that start again.

    Args:
        arguments: of the forward, by name.
        packs: :func:`takes_packed_positions`.

    Raises:
        ValueError: the lengths or positions are not those of `batch` rows of `time` tokens.
    """
    lengths, positions = arguments.get("cu_seq_lens_q"), arguments.get("position_ids")
    if past or (lengths is None and positions is None):
        return Sequence(None, past)
    if lengths is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q needs all sequences in one row, got a batch of {batch}")
        return Sequence.from_cu_seqlens(lengths, time)
    # Three rows of positions are the axes of an image; of four, the first is the text's.
    if not packs or positions is None or (positions.dim() == 3 and positions.shape[0] != 4):
        return Sequence(None, past)
    if positions.dim() == 3:
        positions = positions[0]
    if positions.dim() != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != time:
        raise ValueError(
            f"position_ids without an attention_mask must be [{batch}, {time}], got {list(positions.shape)}"
        )
    positions = positions.expand(batch, -1)
    if positions.is_floating_point():  # Qwen3-Omni gives whole numbers in a floating-point dtype
        positions = positions.long()
    if torch.compiler.is_compiling():
        starts = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
        return Sequence(starts.cumsum(1, dtype=torch.int32), past)
    return Sequence.from_position_ids(positions)
