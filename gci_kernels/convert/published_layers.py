"""The layers of a published LoKI model: their tensors in a checkpoint, and which rows of each are trained."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gci_kernels.convert.files import Checkpoint, ConvertError, LazyTensor, read_json
from gci_kernels.loki import read_positions

CONFIG = "config.json"
# Where the config of each version lists the rows.
ROW_FIELDS = ("target_pos", "target_neurons")

_PART = re.compile(
    r"(?P<module>.+)\.(?:(?P<part>active|frozen|fixed)(?P<kind>(?:_part)?\.weight|_weight|_bias)|(?P<map>index_map))"
)
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class PublishedLayer:
    """One layer, whose rows are kept in two parts.

    Attributes:
        keys: its tensors' names in the checkpoint, by part: "active", "frozen", "active_bias", "frozen_bias" and
            "index_map".
        rows: [k] int64, the trained rows, ascending.
        rest: [out - k] int64, the others, ascending.
    """

    keys: Mapping[str, str]
    rows: Tensor
    rest: Tensor

    @property
    def out_features(self) -> int:
        """The number of all rows."""
        return len(self.rows) + len(self.rest)


def is_part(name: str) -> bool:
    """Whether a tensor of this name is a part of a published layer."""
    return _PART.fullmatch(name) is not None


def other_rows(rows: Tensor, out_features: int) -> Tensor:
    """The rows from 0 to `out_features` that are not in `rows` [k] int64: [out - k] int64, ascending."""
    return torch.ones(out_features, dtype=torch.bool).index_fill_(0, rows, False).nonzero().flatten()


def has_published_layers(checkpoint: Checkpoint) -> bool:
    """Whether a model's checkpoint has published layers."""
    return any(match["part"] == "active" for name in checkpoint if (match := _PART.fullmatch(name)))


def read_published(
    folder: Path, positions: str | os.PathLike | None
) -> tuple[Checkpoint, dict[str, Any], dict[str, PublishedLayer]]:
    """A published model: its tensors, its config and its published layers by name.

    `positions` is a positions JSON, compared with what the checkpoint says, or used where it says nothing.

    Raises:
        ConvertError: a file is missing or damaged, or a layer's parts or positions don't fit together.
    """
    checkpoint, config = Checkpoint(folder), read_json(folder / CONFIG)
    keys: dict[str, dict[str, str]] = {}
    for name in checkpoint:
        match = _PART.fullmatch(name)
        if match is not None:
            part = match["map"] or match["part"].replace("fixed", "frozen") + ("_bias" * (match["kind"] == "_bias"))
            if keys.setdefault(match["module"], {}).setdefault(part, name) != name:
                raise ConvertError(f"{checkpoint.file(name)} holds both {name} and {keys[match['module']][part]}")
    if not any("active" in found for found in keys.values()):
        raise ConvertError(f"{checkpoint.path} has no layers of the published LoKI; an untrained model has none")
    wanted = _wanted_rows(folder / CONFIG, config, positions)
    layers = {module: _layer(module, found, checkpoint, wanted) for module, found in keys.items()}
    trained = {_number(module) for module, layer in layers.items() if len(layer.rows)}
    for source, rows in wanted.items():
        missing = [layer for layer, chosen in enumerate(rows) if chosen and layer not in trained]
        if missing:
            raise ConvertError(f"{checkpoint.path} lacks layer {missing[0]}'s rows, which {source} names")
    return checkpoint, config, layers


def _wanted_rows(
    path: Path, config: Mapping[str, Any], positions: str | os.PathLike | None
) -> dict[str, Sequence[Sequence[int]]]:
    """The rows of each layer that the config and the file `positions` list, each list under its source's name."""
    found: dict[str, Sequence[Sequence[int]]] = {}
    for field in ROW_FIELDS:
        rows = config.get(field)
        if rows is None:
            continue
        if not isinstance(rows, list) or not all(isinstance(layer, list) and _are_rows(layer) for layer in rows):
            raise ConvertError(f"{path}: {field} must be a list of row indices for each layer")
        found[f"{path}'s {field}"] = [sorted(layer) for layer in rows]
    if positions is not None:
        try:
            found[str(positions)] = read_positions(positions)
        except OSError as error:
            raise ConvertError(f"{positions} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConvertError(str(error)) from error
    return found


def _are_rows(layer: list[object]) -> bool:
    return all(type(row) is int and row >= 0 for row in layer)


def _number(module: str) -> int | None:
    match = _LAYER.search(module)
    return None if match is None else int(match[1])


def _layer(
    module: str, keys: dict[str, str], checkpoint: Checkpoint, wanted: Mapping[str, Sequence[Sequence[int]]]
) -> PublishedLayer:
    for part in ("active", "frozen"):
        if part not in keys:
            raise ConvertError(f"{checkpoint.path} lacks the {part} rows of {module}")
    if ("active_bias" in keys) != ("frozen_bias" in keys):
        raise ConvertError(f"{checkpoint.path} holds the bias of some rows of {module} only")
    for plain in (f"{module}.weight", f"{module}.bias"):
        if plain in checkpoint:
            raise ConvertError(f"{checkpoint.file(plain)} holds {plain} beside its parts")
    counts = _check_parts(module, keys, checkpoint)
    rows = _mapped_rows(keys["index_map"], *counts, checkpoint) if "index_map" in keys else None
    number = _number(module)
    for source, layers in wanted.items():
        named = layers[number] if number is not None and number < len(layers) else []
        if rows is not None and named != rows.tolist():
            raise ConvertError(f"{checkpoint.path}: the rows of {module} are not those that {source} names")
        if rows is None:
            rows = _named_rows(module, named, counts, source)
    if rows is None:
        raise ConvertError(f"{checkpoint.path} does not say which rows of {module} are trained: give positions")
    return PublishedLayer(keys, rows, other_rows(rows, sum(counts)))


def _check_parts(module: str, keys: Mapping[str, str], checkpoint: Checkpoint) -> tuple[int, int]:
    """The numbers of trained and of frozen rows; all parts must have shapes and dtypes that fit together."""
    shapes = {part: checkpoint.shape(key) for part, key in keys.items()}
    active, frozen = shapes["active"], shapes["frozen"]
    if len(active) != 2 or len(frozen) != 2 or active[1] != frozen[1]:
        raise ConvertError(
            f"{checkpoint.file(keys['active'])}: the parts of {module} have shapes {list(active)} and {list(frozen)}, "
            "which are not rows of one layer"
        )
    allowed = {
        "active": active, "frozen": frozen, "index_map": (active[0] + frozen[0],), "active_bias": active[:1],
        "frozen_bias": frozen[:1],
    }  # fmt: skip
    dtype = checkpoint.dtype(keys["active"])
    for part, key in keys.items():
        if shapes[part] != allowed[part]:
            shape = f"{list(shapes[part])}, it must be {list(allowed[part])}"
            raise ConvertError(f"{checkpoint.file(key)}: {key} has shape {shape} to fit the layer's weights")
        wanted = torch.int64 if part == "index_map" else dtype
        if checkpoint.dtype(key) != wanted or not dtype.is_floating_point:
            raise ConvertError(f"{checkpoint.file(key)}: {key} is {checkpoint.dtype(key)}, it must be {wanted}")
    return active[0], frozen[0]


def _mapped_rows(key: str, active: int, frozen: int, checkpoint: Checkpoint) -> Tensor:
    """The trained rows according to an index_map; in the published code both parts are ascending."""
    index_map = checkpoint[key]
    order = index_map.argsort()
    order = torch.cat([order[:active].sort().values, order[active:].sort().values])
    if not torch.equal(order.argsort(), index_map):
        raise ConvertError(f"{checkpoint.file(key)} is damaged: {key} does not say of each row where it stands")
    return order[:active].clone()


def _named_rows(module: str, rows: Sequence[int], counts: tuple[int, int], source: str) -> Tensor:
    """The trained rows that `source` lists, as many as the layer has."""
    found = torch.tensor(rows, dtype=torch.int64)
    if len(rows) != counts[0] or (len(rows) and (len(set(rows)) < len(rows) or rows[-1] >= sum(counts))):
        raise ConvertError(
            f"{source} has {len(rows)} rows for {module}, of which {counts[0]} of {sum(counts)} are trained"
        )
    return found


def merged(checkpoint: Checkpoint, layer: PublishedLayer, active: str, frozen: str) -> LazyTensor:
    """A layer's weight [out, in] or bias [out] from its two parts, each row at its index."""
    shape = (layer.out_features, *checkpoint.shape(layer.keys[active])[1:])
    dtype = checkpoint.dtype(layer.keys[active])

    def make() -> Tensor:
        result = torch.empty(shape, dtype=dtype)
        result.index_copy_(0, layer.rows, checkpoint[layer.keys[active]])
        return result.index_copy_(0, layer.rest, checkpoint[layer.keys[frozen]])

    return LazyTensor(dtype, shape, make)
