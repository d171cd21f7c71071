"""Which tokens of a batch a layer of the model sees: the text's, those of an encoder-decoder's targets, or others."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from gci_kernels.models import decoder_layers


@dataclass(frozen=True)
class Grid:
    """The tokens of a batch, [batch, time]."""

    shape: tuple[int, int]
    mask: Tensor | None  # [batch, time], 0 for padding; None: there is none


class TokenGrids:
    """Which tokens of a batch the layers named `keys` of a model see. Made once for a model."""

    def __init__(self, model: nn.Module, keys: Iterable[str]) -> None:
        # Of the parts of the model that see text: (prefix of their layers' names, name of the grid that they see).
        self._parts: list[tuple[str, str]] = [("", "text")]
        if isinstance(model, PreTrainedModel):
            decoder = _prefix(model, model.get_decoder())
            self._parts = [(decoder, "text")]
            if model.config.is_encoder_decoder:
                self._parts = [(decoder, "target"), (_prefix(model, model.get_encoder()), "text")]
        self._found: dict[str, str | None] = {key: self._find(key) for key in keys}

    def of_batch(self, arguments: Mapping[str, Any]) -> dict[str, Grid]:
        """The grids of a batch, "text" and "target"; `arguments`: of the model's forward, by name."""
        targets = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
        found = {
            "text": _grid(arguments, "input_ids", "inputs_embeds", mask="attention_mask"),
            "target": _grid(arguments, *targets, mask="decoder_attention_mask"),
        }
        return {name: grid for name, grid in found.items() if grid is not None}

    def of_layer(self, key: str, grids: Mapping[str, Grid], seen: Tensor) -> Grid | None:
        """The tokens that the layer named `key` sees.

        It follows from where the layer lies and from the shape of `seen` [..., features], one row for each token.

        Returns:
            None where these are no tokens of the text, or it is not known which. Without a text in the batch, every
            layer that gets [batch, time, features] sees the same tokens.
        """
        if key not in self._found:  # added later
            self._found[key] = self._find(key)
        name = self._found[key]
        if not grids:
            return Grid((seen.shape[0], seen.shape[1]), None) if name and seen.dim() == 3 else None
        grid = grids.get(name or "")
        fits = grid is not None and tuple(seen.shape[:-1]) in (grid.shape, (math.prod(grid.shape),))
        return grid if fits else None

    def _find(self, key: str) -> str | None:
        if decoder_layers.CROSS_ATTENTION.search(key) or decoder_layers.EXPERT.search(key):
            return None
        if "." not in key:  # a head, which stands outside of all parts
            return self._parts[0][1]
        return next((name for prefix, name in self._parts if key.startswith(prefix)), None)


def _prefix(model: nn.Module, part: nn.Module) -> str:
    name = next((name for name, module in model.named_modules() if module is part), "")
    return name + "." if name else ""


def _grid(arguments: Mapping[str, Any], *names: str, mask: str) -> Grid | None:
    tokens = next((arguments[name] for name in names if isinstance(arguments.get(name), Tensor)), None)
    if tokens is None or tokens.dim() < 2:
        return None
    batch, time = tokens.shape[:2]
    found = arguments.get(mask)
    if isinstance(found, Tensor) and found.dim() == 2:
        found = found[:, -time:]  # a cache's tokens stand before those of the batch
    return Grid((batch, time), found)
