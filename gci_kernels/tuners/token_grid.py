"""Which tokens of a batch a layer of the model sees: the text's, those of an encoder-decoder's targets, or others."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

# Layers that read an encoder's states in a decoder, and experts that get the tokens routed to them.
_OTHER_TOKENS = re.compile(r"encdec|encoder_attn|cross_?att|\.experts\.", re.IGNORECASE)


@dataclass(frozen=True)
class Grid:
    """Tokens in rows: shape (batch, time), and the mask [batch, time] of those that are no padding, None: all."""

    shape: tuple[int, int]
    mask: Tensor | None


class TokenGrids:
    """The grids of one batch; `given`: what the model's forward was called with, by name."""

    def __init__(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        self.text = _grid(given, "input_ids", "inputs_embeds", mask="attention_mask")
        self.target = _grid(
            given, "decoder_input_ids", "decoder_inputs_embeds", "labels", mask="decoder_attention_mask"
        )
        self._model = model
        self._parts: list[tuple[str, Grid | None]] | None = None

    def of_layer(self, key: str, seen: Tensor) -> Grid | None:
        """The tokens that the layer named `key` sees, told by where it is and by the shape of `seen` [..., features].

        None: none of the text's, or nobody can tell which. Without a text in the batch, every layer that gets
        [batch, time, features] sees the same tokens.
        """
        if self._parts is None:
            self._parts = self._find_parts()
        if _OTHER_TOKENS.search(key):
            return None
        if self.text is None and self.target is None:
            return Grid((seen.shape[0], seen.shape[1]), None) if seen.dim() == 3 else None
        for prefix, grid in self._parts:
            if key.startswith(prefix) or "." not in key:  # a head outside of all parts
                fits = grid is not None and (
                    tuple(seen.shape[:-1]) == grid.shape
                    or (seen.dim() == 2 and seen.shape[0] == grid.shape[0] * grid.shape[1])
                )
                return grid if fits else None
        return None

    def _find_parts(self) -> list[tuple[str, Grid | None]]:
        """(beginning of the names of its layers, its grid) of the parts of the model that see text."""
        model = self._model
        if not isinstance(model, PreTrainedModel):
            return [("", self.text)]
        decoder = _prefix(model, model.get_decoder())
        if model.config.is_encoder_decoder:
            return [(decoder, self.target), (_prefix(model, model.get_encoder()), self.text)]
        return [(decoder, self.text)]


def _prefix(model: nn.Module, part: nn.Module) -> str:
    name = next((name for name, module in model.named_modules() if module is part), "")
    return name + "." if name else ""


def _grid(given: Mapping[str, Any], *names: str, mask: str) -> Grid | None:
    tokens = next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)
    if tokens is None or tokens.dim() < 2:
        return None
    batch, time = tokens.shape[:2]
    found = given.get(mask)
    if isinstance(found, Tensor) and found.dim() == 2:
        found = found[:, -time:]  # a cache's tokens stand before those of the batch
    return Grid((batch, time), found)
