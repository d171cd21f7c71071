"""The inputs of a tiny model: texts, each with an image where the class takes one."""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .tiny import FIRST_TOKEN, LAST_TOKEN

BATCH, LENGTH, NEW_TOKENS = 2, 12, 6

Inputs = dict[str, Any]


def candidates(model: PreTrainedModel) -> Iterator[tuple[str, Inputs]]:
    """Inputs that the model might take, the best first, each with its name: "image and text" or "text"."""
    for image in _images(model):
        try:
            inputs = _with_image(model, image)
        except Exception:  # the model does not take this form of an image
            continue
        yield "image and text", inputs
    yield "text", _text(model)


def _arguments(model: PreTrainedModel) -> Any:
    return inspect.signature(model.forward).parameters


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def _tokens(length: int) -> Tensor:
    return torch.randint(FIRST_TOKEN, LAST_TOKEN, (BATCH, length), generator=_generator())


def _text(model: PreTrainedModel) -> Inputs:
    inputs: Inputs = {"input_ids": _tokens(LENGTH)}
    if "mm_token_type_ids" in _arguments(model):
        inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    if "bbox" in _arguments(model):
        inputs["bbox"] = torch.zeros(BATCH, LENGTH, 4)
    if "qformer_input_ids" in _arguments(model):
        inputs["qformer_input_ids"] = _tokens(LENGTH)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _tokens(LENGTH - 4).flip(1)
    return inputs


def _images(model: PreTrainedModel) -> Iterator[Inputs]:
    """The forms in which models take one image for each text: pixels, tiles of pixels, and patches."""
    known = _arguments(model)
    if "pixel_values" not in known:
        return
    vision = getattr(model.config, "vision_config", None) or model.config
    size, patch = _number(vision, "image_size", 32), _number(vision, "patch_size", 8)
    temporal = _number(vision, "temporal_patch_size", 1)
    for side in dict.fromkeys((size, 4 * patch)):
        sizes = torch.tensor([[side, side]] * BATCH)
        pixels = torch.randn(BATCH, 3, side, side, generator=_generator())
        yield {"pixel_values": pixels}
        yield {"pixel_values": pixels, "image_sizes": sizes}
        yield {"pixel_values": pixels[:, None], "image_sizes": sizes}
        yield {"pixel_values": pixels[:, None].repeat(1, 3, 1, 1, 1), "image_sizes": sizes}
        yield {"pixel_values": pixels[:, None]}
        if "image_embeds_position_mask" in known:
            mask = torch.arange(LENGTH) >= LENGTH - model.config.latent_query_num
            yield {"pixel_values": pixels, "image_embeds_position_mask": mask.expand(BATCH, -1)}
        if "image_attention_mask" in known:
            mask = torch.ones(BATCH, LENGTH, 1, dtype=torch.long)
            yield {"pixel_values": pixels[:, None], "image_attention_mask": mask}
        if "aspect_ratio_ids" in known:
            ones = partial(torch.ones, dtype=torch.long)
            yield {
                "pixel_values": pixels[:, None, None].repeat(1, 1, 4, 1, 1, 1), "aspect_ratio_ids": ones(BATCH, 1),
                "aspect_ratio_mask": ones(BATCH, 1, 4), "cross_attention_mask": ones(BATCH, LENGTH, 1, 4),
            }  # fmt: skip
    grid = torch.tensor([[1, 4, 4]] * BATCH)
    patches = torch.randn(BATCH * 16, 3 * temporal * patch * patch, generator=_generator())
    yield {"pixel_values": patches, "image_grid_thw": grid}
    if "spatial_shapes" in known:
        shapes = {"spatial_shapes": grid[:, 1:], "pixel_attention_mask": torch.ones(BATCH, 16).long()}
        yield {"pixel_values": patches.unflatten(0, (BATCH, 16)), **shapes}
    yield {"pixel_values": patches.unflatten(-1, (3, patch, patch * temporal)), "image_grid_thw": grid}


def _number(config: Any, name: str, otherwise: int) -> int:
    value = getattr(config, name, None)
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, int) else otherwise


@torch.no_grad()
def _with_image(model: PreTrainedModel, image: Inputs) -> Inputs:
    """The image, and texts with a token for each feature of it, where the model has such tokens."""
    inputs = _text(model)
    token = getattr(model.config, "image_token_id", None) or getattr(model.config, "image_token_index", None)
    reader = next((each for each in (model, model.base_model) if hasattr(each, "get_image_features")), None)
    if token is None or reader is None:
        return inputs | image
    wanted = inspect.signature(reader.get_image_features).parameters
    features = reader.get_image_features(**{name: each for name, each in (inputs | image).items() if name in wanted})
    count = _rows(getattr(features, "pooler_output", features)) // BATCH
    image_tokens = torch.full((BATCH, count), token)
    ids = inputs["input_ids"]
    inputs["input_ids"] = torch.cat((ids[:, :2], image_tokens, ids[:, 2:]), dim=1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in _arguments(model):
            inputs[name] = (inputs["input_ids"] == token).long()
    return inputs | image


def _rows(features: Any) -> int:
    """The number of feature vectors."""
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1]
    return sum(map(_rows, features))
