"""LoKI models of the published repository (Nexround/LoKI, arXiv 2505.22120), to and from GCI_LOKI.

The published repository saves whole models. Each adapted down_proj is kept as its trained rows and the others, and
index_map [out] int64 gives the index of each row of the layer in the two together. The names differ between versions:
now active.weight and frozen.weight, before that active_part.weight and fixed_part.weight, or active_weight and
fixed_weight; biases are active_bias and frozen_bias or fixed_bias. The model's config lists the rows of each layer, as
target_pos or target_neurons. Ours keeps the trained rows and their positions, as an adapter to the base model.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gci_kernels.convert import adapters, files, published_layers
from gci_kernels.convert.adapters import ADAPTER, ADAPTER_CONFIG, PREFIX, Parts
from gci_kernels.convert.files import Checkpoint, ConvertError, LazyTensor, Plan
from gci_kernels.convert.formats import PLAIN, Conversion, Converted, Format, adapter_format
from gci_kernels.convert.published_layers import CONFIG, PublishedLayer
from gci_kernels.loki import write_positions
from gci_kernels.ops.row_linear import check_positions
from gci_kernels.progress import bar
from gci_kernels.tuners import LoKIConfig
from gci_kernels.tuners.adapter_file import is_settings

# The published program that merges a model reads the rows from a separate file.
POSITIONS = "target_pos.json"

_OURS = re.compile(r"(?P<module>.+)\.loki_(?:lora_)?(?P<part>positions|active|A|B|active_bias)")
_PUBLISHED_LAYER = re.compile(r"(?:.+\.)?layers\.(\d+)\.[^.]+\.down_proj")
_TIED = "lm_head.weight"


def loki_from_published(
    folder: str | os.PathLike, out: str | os.PathLike, *, base: str | os.PathLike | None = None,
    positions: str | os.PathLike | None = None, progress: bool = True,
) -> Converted:  # fmt: skip
    """A trained model of the published LoKI as an adapter for PeftModel.from_pretrained; its values and dtype stay.

    Args:
        folder: the published model: config.json and safetensors, one file or shards with their index.
        out: the new folder; it must not be there, or be empty.
        base: the folder of the model that was trained. With it, everything but the trained rows is compared with that
            model (in the published model's dtype), for the adapter gives the same model only where that is so.
        positions: the positions JSON the model was made with; needed where the file holds no index_map, else compared.
        progress: show a bar on stderr.

    Raises:
        ConvertError: a file is missing or damaged, there are no published layers or not all of a layer's parts, their
            shapes or positions don't fit, or more than the rows differs from the base. Nothing is left in `out`.
    """
    folder, out = Path(folder), Path(out)
    files.check_target(out)
    checkpoint, config, layers = published_layers.read_published(folder, positions)
    adapted = {module: layer for module, layer in layers.items() if len(layer.rows)}
    if not adapted:
        raise ConvertError(f"{checkpoint.path} has no trained rows")
    if base is not None:
        _compare(checkpoint, Checkpoint(Path(base)), layers, bool(config.get("tie_word_embeddings")), progress)
    plan: dict[str, LazyTensor] = {}
    for module, layer in adapted.items():
        for part in ("active", "active_bias"):
            if part in layer.keys:
                plan[f"{PREFIX}{module}.loki_{part}"] = checkpoint.lazy(layer.keys[part])
        plan[f"{PREFIX}{module}.loki_positions"] = LazyTensor.of(layer.rows)
    settings = LoKIConfig(
        rows={module: len(layer.rows) for module, layer in adapted.items()}, inference_mode=True,
        task_type="CAUSAL_LM", base_model_name_or_path=None if base is None else str(base),
    )  # fmt: skip
    adapters.write_adapter(folder, out, settings, plan, "writing rows", progress)
    note = "nothing was compared with the base model: it must be the one that was trained"
    return Converted(len(adapted), (note,) if base is None else ())


def loki_merge_published(
    folder: str | os.PathLike, out: str | os.PathLike, *, positions: str | os.PathLike | None = None,
    progress: bool = True,
) -> Converted:  # fmt: skip
    """A model of the published LoKI as a plain checkpoint with whole layers; values, dtypes and shards stay.

    Args:
        folder, out, positions, progress: as for :func:`loki_from_published`.

    Raises:
        ConvertError: as :func:`loki_from_published`.
    """
    folder, out = Path(folder), Path(out)
    files.check_target(out)
    checkpoint, config, layers = published_layers.read_published(folder, positions)
    replaced: dict[str, Plan] = {}
    for module, layer in layers.items():
        replaced |= {key: {} for key in layer.keys.values()}
        for part, frozen, name in (("active", "frozen", "weight"), ("active_bias", "frozen_bias", "bias")):
            if part in layer.keys:
                replaced[layer.keys[part]] = {
                    f"{module}.{name}": published_layers.merged(checkpoint, layer, part, frozen)
                }
    for field in (*published_layers.ROW_FIELDS, "auto_map"):
        config.pop(field, None)
    config["architectures"] = [name.removeprefix("LoKI") for name in _architectures(config, folder)]
    with files.new_folder(out) as scratch:
        files.write_json(scratch / CONFIG, config)
        files.copy_companions(folder, scratch)
        files.write_model(scratch, checkpoint, replaced, "merging rows", progress)
    return Converted(len(layers))


def loki_to_published(
    folder: str | os.PathLike, out: str | os.PathLike, *, base: str | os.PathLike, progress: bool = True
) -> Converted:  # fmt: skip
    """A LoKI adapter of ours and its base model as one model in the published format, in its newest layout.

    The rows get the base model's dtype, which the published layer needs (LoKI*: as merging computes them). The
    repository's own Python file, by which transformers finds its classes, is not written.

    Args:
        folder: holds adapter_model.safetensors and adapter_config.json.
        out: the new folder; it must not be there, or be empty. The positions are in its config and in target_pos.json.
        base: the folder of the base model: config.json and safetensors, one file or shards with their index.
        progress: show a bar on stderr.

    Raises:
        ConvertError: a file is missing or damaged, parts of the adapter are missing or unknown, it is another model's,
            or it adapts layers that the published code cannot. Nothing is left in `out`.
    """
    folder, out, base = Path(folder), Path(out), Path(base)
    files.check_target(out)
    adapter, settings, parts = _read_adapter(folder)
    model, config = Checkpoint(base), files.read_json(base / CONFIG)
    rows: list[list[int]] = [[] for _ in range(_layer_count(config, base / CONFIG))]
    replaced: dict[str, Plan] = {}
    for module, found in parts.items():
        number = _published_number(module, len(rows), adapter.path)
        rows[number] = _check_adapted(module, found, adapter, model, settings)
        replaced |= _published_parts(module, found, adapter, model, settings)
    config |= {"target_pos": rows, "architectures": [f"LoKI{name}" for name in _architectures(config, base)]}
    with files.new_folder(out) as scratch:
        files.write_json(scratch / CONFIG, config)
        write_positions(rows, scratch / POSITIONS)
        files.copy_companions(base, scratch)
        files.write_model(scratch, model, replaced, "separating rows", progress)
    rounded = settings.r is None and any(
        torch.promote_types(adapter.dtype(found["active"]), dtype) != dtype
        for module, found in parts.items() for dtype in [model.dtype(f"{module}.weight")]
    )  # fmt: skip
    return Converted(len(parts), ("the rows were rounded to the base model's dtype",) if rounded else ())


OURS = adapter_format(LoKIConfig)
PUBLISHED = Format("a model of the published LoKI", is_model=published_layers.has_published_layers)
CONVERSIONS = (
    Conversion(PUBLISHED, "ours", OURS, loki_from_published),
    Conversion(PUBLISHED, "plain", PLAIN, loki_merge_published),
    Conversion(OURS, "published", PUBLISHED, loki_to_published),
)


def _compare(
    checkpoint: Checkpoint, base: Checkpoint, layers: Mapping[str, PublishedLayer], tied: bool, progress: bool
) -> None:
    """ConvertError where anything but the trained rows differs from the base model."""
    where: dict[str, tuple[str, PublishedLayer | None]]
    where = {name: (name, None) for name in checkpoint if not published_layers.is_part(name)}
    for module, layer in layers.items():
        where[layer.keys["frozen"]] = (f"{module}.weight", layer)
        if "frozen_bias" in layer.keys:
            where[layer.keys["frozen_bias"]] = (f"{module}.bias", layer)
    own = {name for name, _ in where.values()}
    lone = sorted((own ^ set(base)) - ({_TIED} if tied else set()))
    if lone:
        lacking, having = (base, checkpoint) if lone[0] in own else (checkpoint, base)
        raise ConvertError(f"{lacking.path} lacks {lone[0]}, which {having.path} has: is this the model's base?")
    total = sum(checkpoint.nbytes(name) for name in where)
    with bar("comparing with the base", total, in_bytes=True, shown=progress) as shown:
        for name, (original, published) in where.items():
            if original in base and not _same(checkpoint[name], base[original], published):
                raise ConvertError(
                    f"{checkpoint.file(name)}: {name} is not what {base.file(original)} has: that is another model, or "
                    "more than rows was trained"
                )
            shown.advance(checkpoint.nbytes(name))


def _same(found: Tensor, base: Tensor, layer: PublishedLayer | None) -> bool:
    """Whether a tensor equals the base's in its own dtype, bit for bit; of a published layer, its frozen rows."""
    if layer is not None:
        if base.shape[:1] != (layer.out_features,):
            return False
        base = base.index_select(0, layer.rest)
    if found.is_floating_point() and base.is_floating_point():
        base = base.to(found.dtype)
    return found.dtype == base.dtype and found.shape == base.shape and torch.equal(_bits(found), _bits(base))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _read_adapter(folder: Path) -> tuple[Checkpoint, LoKIConfig, Parts]:
    """An adapter of ours: its tensors, its config, and its tensors' names by module and part."""
    path = folder / ADAPTER_CONFIG
    fields = adapters.read_fields(path, LoKIConfig)
    rows = fields.get("rows")
    if not isinstance(rows, dict) or not rows or not all(type(n) is int and n > 0 for n in rows.values()):
        raise ConvertError(f"{path}: rows must be a number of rows for each module, got {rows!r}")
    if fields.get("modules_to_save"):
        raise ConvertError(f"{path}: modules_to_save: a published LoKI model has nothing trained but rows")
    settings, adapter = adapters.make_config(LoKIConfig, path, **fields), Checkpoint(folder, ADAPTER)
    keys = [key for key in adapter if not is_settings(key)]
    parts, _ = adapters.group_by_module(keys, _OURS, adapter.path, "LoKI", modules=rows)
    return adapter, settings, {module: parts.get(module, {}) for module in rows}


def _architectures(config: Mapping[str, Any], folder: Path) -> list[str]:
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConvertError(f"{folder / CONFIG}: architectures must be a list of class names, got {names!r}")
    return names


def _layer_count(config: Mapping[str, Any], path: Path) -> int:
    count = config.get("num_hidden_layers")
    if type(count) is not int or count < 1:
        raise ConvertError(f"{path}: num_hidden_layers must be a number of layers, got {count!r}")
    return count


def _published_number(module: str, layers: int, path: Path) -> int:
    match = _PUBLISHED_LAYER.fullmatch(module)
    if match is None:
        raise ConvertError(f"{path} adapts {module}; the published LoKI adapts down_proj of decoder layers")
    if int(match[1]) >= layers:
        raise ConvertError(f"{path} adapts {module}; the base model has {layers} layers")
    return int(match[1])


def _check_adapted(
    module: str, found: Mapping[str, str], adapter: Checkpoint, model: Checkpoint, settings: LoKIConfig
) -> list[int]:  # fmt: skip
    """One module's rows; ConvertError where its parts do not fit the base model."""
    weight, counts = f"{module}.weight", settings.rows or {}
    if weight not in model or len(model.shape(weight)) != 2 or not model.dtype(weight).is_floating_point:
        raise ConvertError(f"{model.path} has no weight {weight} that rows could be of: is it this adapter's base?")
    (outer, inner), k, r = model.shape(weight), counts[module], settings.r
    allowed = {"positions": (k,)} | ({"active": (k, inner)} if r is None else {"A": (r, inner), "B": (k, r)})
    if f"{module}.bias" in model:
        allowed["active_bias"] = (k,)
    shapes = {part: adapter.shape(key) for part, key in found.items()}
    adapters.check_parts(shapes, allowed, adapter.path, f"{module}.loki_{{}}".format, "the base model")
    positions = adapter[found["positions"]]
    try:
        check_positions(positions, outer)
    except ValueError as error:
        raise ConvertError(f"{adapter.path}: {found['positions']}: {error}") from error
    rows = positions.tolist()
    if positions.dtype != torch.int64 or rows != sorted(rows):
        raise ConvertError(f"{adapter.path}: {found['positions']} must be ascending int64 row numbers")
    return rows


def _published_parts(
    module: str, found: Mapping[str, str], adapter: Checkpoint, model: Checkpoint, settings: LoKIConfig
) -> dict[str, Plan]:  # fmt: skip
    """What replaces a module's weight and bias."""
    rows = adapter[found["positions"]]
    weight, bias = f"{module}.weight", f"{module}.bias"
    (outer, inner), dtype, k = model.shape(weight), model.dtype(weight), len(rows)
    rest = published_layers.other_rows(rows, outer)

    def active() -> Tensor:
        if settings.r is None:
            return adapter[found["active"]].to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        change = adapter[found["B"]].to(wide) @ adapter[found["A"]].to(wide)
        return (model[weight].index_select(0, rows).to(wide) + settings.lora_alpha / settings.r * change).to(dtype)

    index_map = torch.cat([rows, rest]).argsort()
    plans: dict[str, Plan] = {
        weight: {
            f"{module}.active.weight": LazyTensor(dtype, (k, inner), active),
            f"{module}.frozen.weight": LazyTensor(
                dtype, (outer - k, inner), lambda: model[weight].index_select(0, rest)
            ),
            f"{module}.index_map": LazyTensor.of(index_map),
        }
    }  # fmt: skip
    if bias in model:
        bias_dtype = model.dtype(bias)
        plans[bias] = {
            f"{module}.active_bias": LazyTensor(bias_dtype, (k,), lambda: adapter[found["active_bias"]].to(bias_dtype)),
            f"{module}.frozen_bias": LazyTensor(bias_dtype, (outer - k,), lambda: model[bias].index_select(0, rest)),
        }
    return plans
