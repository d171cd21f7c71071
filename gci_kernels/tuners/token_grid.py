"""Which tokens of a batch a layer of the model sees: the text's, those of an encoder-decoder's targets, or others."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from gci_kernels.models import decoder_layers


@dataclass(frozen=True)
class Grid:
    """Tokens in rows: shape (batch, time), and the mask [batch, time] of those that are no padding, None: all."""

    shape: tuple[int, int]
    mask: Tensor | None

    @property
    def tokens(self) -> int:
        return self.shape[0] * self.shape[1]


class TokenGrids:
    """Where a model's layers, called `keys`, are, and what they see of a batch. Made once for a model."""

    def __init__(self, model: nn.Module, keys: Iterable[str]) -> None:
        # (beginning of the names of its layers, the grid that they see) of the parts of the model that see text.
        self._parts: list[tuple[str, str]] = [("", "text")]
        if isinstance(model, PreTrainedModel):
            decoder = _prefix(model, model.get_decoder())
            self._parts = [(decoder, "text")]
            if model.config.is_encoder_decoder:
                self._parts = [(decoder, "target"), (_prefix(model, model.get_encoder()), "text")]
        self._found: dict[str, str | None] = {key: self._find(key) for key in keys}

    def of_batch(self, given: Mapping[str, Any]) -> dict[str, Grid]:
        """The grids of a batch, by name; `given`: what the model's forward was called with, by name."""
        targets = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
        found = {
            "text": _grid(given, "input_ids", "inputs_embeds", mask="attention_mask"),
            "target": _grid(given, *targets, mask="decoder_attention_mask"),
        }
        return {name: grid for name, grid in found.items() if grid is not None}

    def of_layer(self, key: str, grids: Mapping[str, Grid], seen: Tensor) -> Grid | None:
        """The tokens that the layer named `key` sees, told by where it is and by the shape of `seen` [..., features].

        None: none of the text's, or nobody can tell which. Without a text in the batch, every layer that gets
        [batch, time, features] sees the same tokens.
        """
        if key not in self._found:  # added later
            self._found[key] = self._find(key)
        name = self._found[key]
        if not grids:
            return Grid((seen.shape[0], seen.shape[1]), None) if name and seen.dim() == 3 else None
        grid = grids.get(name or "")
        if grid is None or (tuple(seen.shape[:-1]) != grid.shape and (seen.dim() != 2 or len(seen) != grid.tokens)):
            return None
        return grid

    def _find(self, key: str) -> str | None:
        if decoder_layers.CROSS_ATTENTION.search(key) or decoder_layers.EXPERT.search(key):
            return None
        if "." not in key:  # a head, which stands outside of all parts
            return self._parts[0][1]
        return next((name for prefix, name in self._parts if key.startswith(prefix)), None)


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
