"""Finds the decoder layers of a transformers model, whatever the model calls them and wherever they lie.

The list of decoder layers is one of many ModuleLists: experts, embeddings of several codebooks and the layers of a
vision or audio tower are others. They are told apart as transformers does it: `get_decoder()` returns the part of the
model that decodes text, every module that owns a config is a model of its own (a tower has another config than the text
model), layers derive from GradientCheckpointingLayer, and the config gives their number.
"""

import re
from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

#: Names of modules in a decoder that see another sequence, that of an encoder.
CROSS_ATTENTION = re.compile(r"(^|[._])(cross_?att|enc_?dec_?att|encoder_att|encoder_decoder_att)", re.I)
#: Names of layers in one expert of several, which gets some of the tokens, in an order that only its router knows.
EXPERT = re.compile(r"(^|\.)experts\.\d+\.")

_Candidate = tuple[PreTrainedModel, str, nn.ModuleList]  # the model that owns the list, the list's name in it, the list


def find(model: nn.Module) -> tuple[PreTrainedModel, tuple[nn.Module, ...]]:
    """The backbone, which is the module whose forward gets mask, positions and cache, and its decoder layers, in order.

    Layers may be of several classes. Of a vision-language model the text model's are returned.

    Args:
        model: a decoder-only model from transformers.

    Raises:
        TypeError: not a model from transformers.
        ValueError: an encoder-decoder, or no list of layers, or several that cannot be told apart.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel, or a PeftModel around one, got {type(model).__name__}")
    if model.config.is_encoder_decoder:
        raise ValueError(f"model must be decoder-only, got the encoder-decoder {type(model).__name__}")
    first: list[_Candidate] = []
    for root in (model.get_decoder(), model.base_model, model):
        if not isinstance(root, PreTrainedModel):  # get_decoder() may name a head that happens to be called decoder
            continue
        candidates = list(_lists(root, root, ""))
        first = first or candidates
        chosen = _choose(candidates, root.config.get_text_config(decoder=True))
        if chosen:
            layers = dict.fromkeys(layer for _, _, layers in chosen for layer in layers)
            return chosen[0][0], tuple(layers)
    lists = {name: sorted({type(layer).__name__ for layer in layers}) for _, name, layers in first}
    raise ValueError(
        f"model: the decoder layers of {type(model).__name__} must be one ModuleList of its text model, "
        f"found {lists or 'no ModuleList of layers'}"
    )


def _lists(module: nn.Module, owner: PreTrainedModel, name: str) -> Iterator[_Candidate]:
    """Every outermost ModuleList of modules that contain linear layers, with the model that owns it."""
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if isinstance(child, nn.ModuleList):
            if len(child) and all(_has_linear(layer) for layer in child):
                yield owner, path, child
        elif isinstance(child, PreTrainedModel):
            yield from _lists(child, child, "")
        else:
            yield from _lists(child, owner, path)


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(each, (nn.Linear, Conv1D)) for each in module.modules() if each is not module)


def _choose(candidates: Sequence[_Candidate], config: PretrainedConfig) -> list[_Candidate]:
    """The list of decoder layers; several where a model runs them in turn and their classes are equal; or none."""
    count = getattr(config, "num_hidden_layers", None)
    tests = (
        lambda owner, layers: type(owner.config) is type(config),
        lambda owner, layers: all(isinstance(layer, GradientCheckpointingLayer) for layer in layers),
        lambda owner, layers: len(layers) == count,
    )
    for number, test in enumerate(tests):
        passed = [each for each in candidates if test(each[0], each[2])]
        if passed or number == 0:  # the layers of a model with another config are never the text model's
            candidates = passed
    same = len({(id(owner), frozenset(map(type, layers))) for owner, _, layers in candidates}) == 1
    return list(candidates) if same else []
