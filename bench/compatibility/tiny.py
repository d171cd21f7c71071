"""A tiny model with random weights of any class of transformers: its default config with every size made small."""

import dataclasses
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

#: The kinds of classes, in the order in which a class that is of several counts as one of them.
MAPPINGS = {
    "vision-language": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "sequence-to-sequence": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
MOST_PARAMETERS = 10_000_000
VOCABULARY = 128
FIRST_TOKEN, LAST_TOKEN = 10, 100  # what texts are made of: below lie pad, bos and eos, above what stands for an image
PAD, BOS, EOS = 0, 1, 2

# What a size is made at most, by the first pattern that is the whole of its field's name. Fields of other names stay.
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
        (r".*heads? | n_head | attention_heads", 4),
        (r"type_vocab_size", 2),
        (r".*(hidden_|encoder_|decoder_)?layers | n_layer | .*depth | num_blocks", 2),
        (r".*head_dim | .*head_size | d_kv | .*qk_.*dim | mamba_d_head", 16),
        (r".*rank | .*state_size | .*d_state", 16),
        (r".*(intermediate_size.* | ffn.*dim | ffn_hidden_size | n_inner | mlp_dim | d_ff | dim_ff | feed_forward_size)", 96),
        (r".*vocab_size", VOCABULARY),
        (r".*(hidden_size | hidden_dim | d_model | n_embd | embed_dim | embedding_size | embedding_dim | projection_dim"
         r"| projector_dim | text_hidden_size | lru_width | emb_dim | query_dim | d_inner | latent_dim)", 64),
        (r".*(position_embeddings | n_positions | n_ctx | .*source_positions | .*target_positions | max_seq_len"
         r"| max_sequence_length)", 128),
        (r"image_size | force_image_size", 32),
        (r"patch_size", 8),
        (r"sliding_window | attention_window_size | .*chunk_size | attention_window", 8),
    )
)  # fmt: skip

# What some classes need beside: fields of their config, with those of sub-configs inside.
_GIVEN: dict[str, dict[str, Any]] = {}


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
    config = tiny_config(cls.config_class, _GIVEN.get(name, {}))
    model = cls(config).float().eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{parameters:,} parameters are too many")
    _fill(model)
    return model


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Random values in which every layer counts; transformers' own are so small that many hardly do, some are zeros."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.add_(noise, alpha=0.1)


def tiny_config(cls: type[PretrainedConfig], given: dict[str, Any]) -> PretrainedConfig:
    """A config with `given` in it and all other sizes small.

    Lists with an entry for each layer keep one entry of each kind, so that a model of several kinds of layers stays one.
    """
    standard = cls()
    parts = cls.sub_configs_defaults
    fields = {field.name: getattr(standard, field.name, None) for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name in parts:
            part = getattr(standard, name)
            if isinstance(part, PretrainedConfig):
                values[name] = tiny_config(type(part), _inner(parts[name], type(part)) | given.get(name, {}))
        elif _small(name, value) != value:
            values[name] = _small(name, value)
    values |= _layers(standard, fields)
    own = {name: value for name, value in given.items() if name not in parts}
    config = cls(**(values | own))
    _fit_rope(config)
    return config


def _inner(spec: Any, cls: type[PretrainedConfig]) -> dict[str, Any]:
    """What the outer config asks of the inner one, but sizes."""
    return {name: value for name, value in spec.init_kwargs.items() if _small(name, value) == value}


def _small(name: str, value: Any) -> Any:
    """A field's value in a tiny config."""
    if isinstance(value, float) and "drop" in name:
        return 0.0
    if name == "pad_token_id" or name.endswith("_pad_token_id"):
        return PAD
    if name == "bos_token_id":
        return BOS
    if name in ("eos_token_id", "sep_token_id"):
        return EOS
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if re.fullmatch(r".*token_(id|index)|.*_(start|end|patch|newline)_id|blank_id", name):
        return value if value < FIRST_TOKEN else _special(name)
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            return min(value, size)
    return value


_specials: dict[str, int] = {}


def _special(name: str) -> int:
    """A number for the token of a field, the same for fields of one name."""
    return _specials.setdefault(name, LAST_TOKEN + len(_specials) % (VOCABULARY - LAST_TOKEN))


def _layers(standard: PretrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """The number of layers, and what is listed for each of them."""
    counts = {name for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if name in fields}
    count = next((fields[name] for name in counts if isinstance(fields[name], int)), None)
    if count is None or count < 3:
        return {}
    listed = {name: value for name, value in fields.items() if isinstance(value, (list, tuple)) and len(value) == count}
    rows = list(dict.fromkeys(zip(*listed.values(), strict=True))) if listed else []
    rows = (rows * 2)[: max(2, min(len(rows), 4))]
    shortened = {name: [row[i] for row in rows] for i, name in enumerate(listed)} if rows else {}
    return {name: max(2, len(rows)) for name in counts} | shortened


def _fit_rope(config: PretrainedConfig) -> None:
    """The parts of a rotary embedding sum up to what is rotated."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    for part in (parameters, *(part for part in parameters.values() if isinstance(part, dict))):
        _fit(part, config)


def _fit(parameters: dict[str, Any], config: PretrainedConfig) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    half = int(head * (parameters.get("partial_rotary_factor") or 1)) // 2
    if "mrope_section" in parameters:
        count = len(parameters["mrope_section"])
        parameters["mrope_section"] = [half - (count - 1) * (half // count), *[half // count] * (count - 1)]
    for name in ("long_factor", "short_factor"):
        if name in parameters:
            parameters[name] = parameters[name][:half]
