"""A tiny model of any class of transformers, with random weights: its default config, every size reduced."""

import dataclasses
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

#: The kinds of classes; a class of several kinds counts as the first of them.
MAPPINGS = {
    "vision-language": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "sequence-to-sequence": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
MOST_PARAMETERS = 40_000_000
VOCABULARY = 128
FIRST_TOKEN, LAST_TOKEN = 10, 100  # the tokens of texts: lower ones are pad, bos and eos, higher ones stand for images
PAD, BOS, EOS = 0, 1, 2

# The largest value of a size, by the first pattern that matches its field's whole name. Other fields stay as they are.
_SIZES: tuple[tuple[str, int], ...] = tuple(
    (pattern.replace(" ", ""), size)
    for pattern, size in (
        (r".*(nextn_predict|mtp|kv_shared)_layers | additional_vocab_size | mem_len", 0),
        (r"first_k_dense_replace | num_dense_layers | max_window_layers | n_group | topk_group | .*n_?groups", 1),
        (r".*shared_experts?", 1),
        (r".*(experts_per_tok | experts_per_token | top_k | topk_experts | moe_topk | moe_k | experts_top_k)", 2),
        (r"(num_|n_)?.*experts", 4),
        (r".*(key_value | kv)_heads | kv_n_heads | .*_key_heads | .*kv_heads", 2),
        (r"mamba_(n|num)_heads | n_mamba_heads", 8),
        (r".*head_dim | .*head_size | d_kv | .*qk_.*dim | mamba_d_head | d_head | rotary_dim", 16),
        (r".*heads? | n_head | attention_heads", 4),
        (r"type_vocab_size", 2),
        (r".*(hidden_|encoder_|decoder_)?layers | n_layer | .*depth | num_blocks", 2),
        (r".*rank | .*state_size | .*d_state", 16),
        (r".*(intermediate_size.* | ffn.*dim | ffn_hidden_size | n_inner | mlp_dim | d_ff | dim_ff"
         r"| feed_forward_size)", 96),
        (r".*vocab_size(_per_layer_input)?", VOCABULARY),
        (r"hidden_size_per_layer_input | num_image_tokens | latent_query_num | num_query_tokens", 16),
        (r".*(hidden_size | hidden_dim | d_model | n_embd | embed_dim | embedding_size | embedding_dim | projection_dim"
         r"| projector_dim | text_hidden_size | lru_width | emb_dim | query_dim | d_inner | latent_dim)", 64),
        (r".*(position_embeddings | n_positions | n_ctx | .*source_positions | .*target_positions | max_seq_len"
         r"| max_sequence_length)", 128),
        (r"image_size | force_image_size", 32),
        (r"patch_size", 8),
        (r"sliding_window | attention_window_size | .*chunk_size | attention_window", 8),
    )
)  # fmt: skip

_HEAD = 16  # the size of a head of attention in most tiny models
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {**_ROPE, "mrope_section": [3, 3, 2]}
_HALF_MROPE = {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}  # fmt: skip

# Further fields that configs need, their own and those of their parts, by the name of the config's class.
_EXTRA_FIELDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("Ernie4_5_VLMoeTextConfig", "Glm4vTextConfig", "GlmOcrTextConfig", "PaddleOCRTextConfig",
         "Qwen2_5_VLTextConfig", "Qwen2_5OmniTextConfig", "Qwen2VLTextConfig"),
        {"rope_parameters": _MROPE},
    ),
    **dict.fromkeys(("Blip2Config", "InstructBlipConfig"), {"image_token_index": 101}),
    **dict.fromkeys(("Gemma3Config", "T5Gemma2EncoderConfig"), {"mm_tokens_per_image": 4}),
    **dict.fromkeys(("HunYuanDenseV1Config", "HunYuanMoEV1Config", "MinistralConfig"), {"head_dim": _HEAD}),
    **dict.fromkeys(("MusicgenDecoderConfig", "MusicgenMelodyDecoderConfig"), {"num_codebooks": 1}),
    **dict.fromkeys(("Qwen2_5OmniThinkerConfig", "Qwen3OmniMoeThinkerConfig"), {"vision_start_token_id": 103}),
    "AriaConfig": {"projector_patch_to_query_dict": {16: 4}},
    "BambaConfig": {"attn_layer_indices": [1], "mamba_d_head": 16},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 101}},
    "CohereCompassTextConfig": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _ROPE),
    },
    "DbrxAttentionConfig": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "DeepseekOcr2TextConfig": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "DiffusionGemmaTextConfig": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Florence2VisionConfig": {
        "depths": [1, 1, 1, 1], "embed_dim": [32, 32, 32, 64], "num_heads": [2, 2, 2, 2], "num_groups": [2, 2, 2, 2]
    },
    "Glm4vMoeTextConfig": {"rope_parameters": _HALF_MROPE},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"], "mamba_d_head": 16},
    "HunYuanVLTextConfig": {"head_dim": _HEAD, "rope_parameters": {**_MROPE, "mrope_section": [2, 2, 2, 2]}},
    "InstructBlipVideoConfig": {"video_token_index": 101},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Kosmos2Config": {"latent_query_num": 4},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Llama4VisionConfig": {"projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64},
    "LongcatFlashConfig": {"qk_head_dim": 32},
    "Mamba2Config": {"num_heads": 8},
    "MllamaTextConfig": {"cross_attention_layers": [1]},
    "MllamaVisionConfig": {"num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 128},
    "Molmo2AdapterConfig": {"vision_feature_layer": [-1, -2]},
    "NemotronConfig": {"num_key_value_heads": 2},
    "Qwen4ExpTextConfig": _INDEXER,
    "RecurrentGemmaConfig": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    "ReformerConfig": {
        "axial_pos_embds": False, "hash_seed": 0,
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2,
        "attn_layers": ["local", "local"],
    },
    "Step3p7TextConfig": {"sliding_window": 8, "num_sliding_attention_heads": 4},
    "xLSTMConfig": {"qk_dim_factor": 1.0},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "n_mamba_heads": 2,
        "attention_hidden_size": 128, "attention_head_dim": 32,
    },
}  # fmt: skip


def classes() -> dict[str, str]:
    """The name of every class of the installed transformers that is checked, and its kind."""
    found: dict[str, str] = {}
    for kind, mapping in MAPPINGS.items():
        for names in mapping.values():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(name, kind)
    return dict(sorted(found.items()))


def tiny_model(name: str) -> PreTrainedModel:
    """A model of the class `name` in evaluation mode, in float32, the same at every call.

    Raises:
        Exception: whatever stands in the way.
    """
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    _specials.clear()
    fields = {field.name for field in dataclasses.fields(cls.config_class)}
    # Of several kinds of models an encoder is the default, which attends in both directions.
    decodes = classes().get(name) == "causal" and "is_decoder" in fields
    config = tiny_config(cls.config_class, **({"is_decoder": True} if decodes else {}))
    model = cls(config).float().eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{parameters:,} parameters are too many")
    _fill(model)
    model.generation_config.update(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    if getattr(model.generation_config, "decoder_start_token_id", None) is None:
        model.generation_config.decoder_start_token_id = PAD
    return model


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Random values with which every layer has an effect; those of transformers are too small, or zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.add_(noise, alpha=0.1)


def tiny_config(cls: type[PretrainedConfig], **overrides: Any) -> PretrainedConfig:
    """A config with `overrides` and otherwise small sizes.

    Lists with an entry for each layer keep one entry of each kind, so that a hybrid stays one.
    """
    extra = _EXTRA_FIELDS.get(cls.__name__, {}) | overrides
    parts = cls.sub_configs_defaults
    standard = _standard(cls, extra)
    fields = {field.name: _standard_value(standard, field) for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            values[name] = tiny_config(type(value), **_inner(parts.get(name)) | extra.get(name, {}))
        elif (small := _small(name, value)) != value:
            values[name] = small
    values |= _layers(standard, fields)
    if fields.get("kv_lora_rank") or fields.get("qk_nope_head_dim"):  # latent attention has no groups of heads
        values["num_key_value_heads"] = values.get("num_attention_heads")
    own = {name: value for name, value in extra.items() if not isinstance(fields.get(name), PretrainedConfig)}
    return cls(**(values | own))


def _standard(cls: type[PretrainedConfig], extra: dict[str, Any]) -> PretrainedConfig:
    """The default config; of the few classes without one, the config with the given fields."""
    try:
        return cls()
    except Exception:
        return cls(**extra)


def _standard_value(standard: PretrainedConfig, field: dataclasses.Field) -> Any:
    try:
        return getattr(standard, field.name, None)
    except Exception:  # a property whose value differs between layers; the field has a default
        return field.default


def _inner(spec: Any) -> dict[str, Any]:
    """The fields that the outer config sets in the inner one, sizes left out."""
    fields = {} if spec is None else spec.init_kwargs
    return {name: value for name, value in fields.items() if _small(name, value) == value}


_TOKENS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "sep_token_id": EOS}


def _small(name: str, value: Any) -> Any:
    """A field's value in a tiny config."""
    if name in _TOKENS or name.endswith("_pad_token_id"):
        return _TOKENS.get(name, PAD)
    if name in ("vision_feature_layer", "vision_feature_layers"):
        return -1 if isinstance(value, int) else [-1, -2]
    if isinstance(value, int) and not isinstance(value, bool):
        return _small_number(name, value)
    if isinstance(value, float) and "drop" in name:
        return 0.0
    if name == "rope_parameters" and isinstance(value, dict):
        return _small_rope(value)
    if name == "image_size" and isinstance(value, (list, tuple)):
        return [32] * len(value)
    return [[32, 32], [32, 64]] if name == "image_grid_pinpoints" and value else value


def _small_number(name: str, value: int) -> int:
    if re.fullmatch(r".*token_(id|index)|.*_(start|end|patch|newline)_id|blank_id", name):
        return value if value < FIRST_TOKEN else _special(name)
    return next((min(value, size) for pattern, size in _SIZES if re.fullmatch(pattern, name)), value)


def _small_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters whose sections sum up to the rotated half of a tiny head."""
    half = int(_HEAD * (parameters.get("partial_rotary_factor") or 1)) // 2
    side = (half + 1) // 3
    small = {name: _small_rope(part) if isinstance(part, dict) else part for name, part in parameters.items()}
    if "mrope_section" in small:
        small["mrope_section"] = [side, side, half - 2 * side]
    return small | {name: small[name][:half] for name in ("long_factor", "short_factor") if name in small}


_specials: dict[str, int] = {}  # of the model that is being made


def _special(name: str) -> int:
    """A token id for a field, the same for fields of the same name."""
    return _specials.setdefault(name, LAST_TOKEN + len(_specials) % (VOCABULARY - LAST_TOKEN))


def _layers(standard: PretrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """The number of layers, and the lists with an entry for each layer."""
    counts = {name for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if name in fields}
    count = next((fields[name] for name in counts if isinstance(fields[name], int)), None)
    if count is None or count < 3:
        return {}
    listed = {name: value for name, value in fields.items() if isinstance(value, (list, tuple)) and len(value) == count}
    rows = list(dict.fromkeys(zip(*listed.values(), strict=True))) if listed else []
    rows = (rows * 2)[: max(2, min(len(rows), 4))]
    shortened = {name: [_small(name, row[i]) for row in rows] for i, name in enumerate(listed)} if rows else {}
    return {name: max(2, len(rows)) for name in counts} | shortened
