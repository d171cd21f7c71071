"""Which rows of which modules of a model LoKI trains: from files, lists and mappings, and as a layer holds them."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gci_kernels.loki.architecture import PROJECTIONS
from gci_kernels.loki.scores import HDF5_SUFFIXES, load_scores
from gci_kernels.loki.selection import read_positions, select
from gci_kernels.models import decoder_layers, experts
from gci_kernels.models.targets import plain_modules
from gci_kernels.ops.row_linear import check_positions
from gci_kernels.tuners import fusion, hooks

Rows = Sequence[int] | Set[int] | np.ndarray | Tensor
Positions = str | os.PathLike | Mapping[str | int, Rows] | Sequence[Rows] | np.ndarray | Tensor
# One module's rows in some order, and those of all modules by what the caller calls them.
_ModuleRows = Sequence[int] | Tensor
_Given = Mapping[Any, _ModuleRows] | Sequence[_ModuleRows]


def resolve(
    positions: Positions, quota: float | None, target_modules: set[str] | str | None, model: nn.Module
) -> dict[str, Tensor]:
    """Module name -> ascending rows [k] int64 on the CPU, of the modules that have any.

    Args:
        positions: a positions JSON, a scores file, a list of rows for each decoder layer, or a mapping from layer
            numbers or module names (whole, or their ends) to rows.
        quota: percent, for a scores file; None for everything else.
        target_modules: what the layers' modules are called; None: their last projection, as attribution finds it.

    Raises:
        ValueError: naming what does not fit the model, or is no row.
    """
    given = _read(positions, quota)
    modules = {name: module for name, module in plain_modules(model).items() if fusion.has_rows(module)}
    found: dict[str, _ModuleRows]
    if isinstance(given, Mapping) and not all(isinstance(key, int) for key in given):
        found = {_full_name(name, modules): rows for name, rows in given.items()}
        if len(found) < len(given):
            raise ValueError(f"positions name a module twice: {', '.join(map(str, given))}")
    else:
        found = _by_decoder_layer(given, target_modules, model, modules)
    rows = {name: _checked_rows(name, modules[name], rows) for name, rows in found.items() if len(rows)}
    if not rows:
        raise ValueError("positions must name at least one row")
    return rows


def _read(positions: Any, quota: float | None) -> _Given:
    """The positions in memory; scores are turned into positions by `quota`."""
    is_path = isinstance(positions, (str, os.PathLike))
    has_scores = is_path and Path(positions).suffix in (".safetensors", *HDF5_SUFFIXES)
    if has_scores != (quota is not None):
        raise ValueError(
            "quota selects rows from a scores file (.safetensors, .h5), and is needed for one; other positions say "
            f"themselves which rows: got quota={quota} with {positions if is_path else type(positions).__name__}"
        )
    if is_path:
        return read_positions(positions) if quota is None else select(load_scores(positions), quota)
    given = positions.tolist() if isinstance(positions, (np.ndarray, Tensor)) else positions
    if isinstance(given, Mapping):
        # numpy's integers are layer numbers too.
        return {key.__index__() if hasattr(key, "__index__") else key: _listed(rows) for key, rows in given.items()}
    if not isinstance(given, Sequence):
        raise ValueError(f"positions must be a file, a list or a mapping, got {type(given).__name__}")
    return [_listed(rows) for rows in given]


def _listed(rows: Rows) -> _ModuleRows:
    """One module's rows, sets and arrays as lists."""
    if isinstance(rows, Tensor) and rows.dim():
        return rows
    if isinstance(rows, (str, bytes, Tensor)) or not isinstance(rows, Iterable):
        raise ValueError(f"positions must have the rows of each layer, got {rows!r} for those of one")
    return list(rows)


def _full_name(key: object, modules: Mapping[str, nn.Module]) -> str:
    """The name of the one module whose name is or ends with `key`."""
    if not isinstance(key, str):
        raise ValueError(f"positions must have layer numbers or module names as keys, not both: got {key!r}")
    found = [name for name in modules if name == key or name.endswith("." + key)]
    if len(found) != 1:
        raise ValueError(f"positions: {len(found)} linear layers of this model are named {key!r}, one is needed")
    return found[0]


def _by_decoder_layer(
    positions: _Given, target_modules: set[str] | str | None, model: nn.Module, modules: Mapping[str, nn.Module]
) -> dict[str, _ModuleRows]:
    """The rows of each decoder layer's one module."""
    numbers, count = _layer_numbers(model, modules)
    candidates = {
        layer: _candidates([name for name, number in numbers.items() if number == layer], target_modules)
        for layer in set(numbers.values())
    }
    count = sum(map(bool, candidates.values())) if count is None else count
    if not isinstance(positions, Mapping) and len(positions) != count:
        raise ValueError(f"positions are for {len(positions)} decoder layers, this model has {count}")
    found: dict[str, _ModuleRows] = {}
    for layer, rows in positions.items() if isinstance(positions, Mapping) else enumerate(positions):
        names = candidates.get(layer, [])
        if len(rows) and len(names) != 1:
            raise ValueError(
                f"positions: decoder layer {layer} has {len(names)} modules that they could mean "
                f"({', '.join(names) or 'none'}), one is needed: choose target_modules, or name the modules"
                f"{'' if names else experts.hint(model)}"
            )
        found |= {name: rows for name in names if len(rows)}
    if target_modules is None:
        experts.refuse_part(model, found)
    return found


def _layer_numbers(model: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[dict[str, int], int | None]:
    """The number of the decoder layer that each module lies in, by name, and how many there are, where that is known.

    A vision tower's layers have numbers too. What is no decoder-only model of transformers is taken by the first number
    in a name, and a layer that then has several candidates is refused.
    """
    if isinstance(model, PreTrainedModel) and not model.config.is_encoder_decoder:
        _, layers = decoder_layers.find(model)
        inside = {module: number for number, layer in enumerate(layers) for module in layer.modules()}
        return {name: inside[module] for name, module in modules.items() if module in inside}, len(layers)
    found = {name: re.search(r"(?:^|\.)(\d+)\.", name) for name in modules}
    return {name: int(number[1]) for name, number in found.items() if number}, num_decoder_layers(model)


def num_decoder_layers(model: nn.Module) -> int | None:
    """How many decoder layers the model's config names; None where it has no config of transformers."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config().num_hidden_layers if hasattr(config, "get_text_config") else None


def _candidates(names: list[str], target_modules: set[str] | str | None) -> list[str]:
    """Of one decoder layer's modules the targets; None: those called by the first of PROJECTIONS that any is called."""
    if target_modules is not None:
        others = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        config = SimpleNamespace(target_modules=target_modules, **others)
        return [name for name in names if check_target_module_exists(config, name)]
    leaves = {n: n.rpartition(".")[2] for n in names if "attn" not in n and "attention" not in n}
    first = next((leaf for leaf in PROJECTIONS if leaf in leaves.values()), None)
    return [name for name, leaf in leaves.items() if leaf == first]


def _checked_rows(name: str, module: Any, rows: _ModuleRows) -> Tensor:
    """The rows of the module `name`, ascending [k] int64 on the CPU."""
    try:
        found = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    is_integer = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if not is_integer or found.dim() != 1:
        raise ValueError(f"positions of {name} must be row indices, got {rows!r}"[:200])
    found = found.to("cpu", torch.int64).sort().values
    try:
        check_positions(found, module.nf if isinstance(module, Conv1D) else module.out_features)
    except ValueError as error:
        raise ValueError(f"positions of {name}: {error}") from error
    return found


class RowPositions(BufferDict):
    """The rows of every adapter, [k] int64 by name, and which of them are known: loading fills them in later."""

    def __init__(self, out_features: int) -> None:
        super().__init__(persistent=True)
        self.out_features = out_features
        self.known: set[str] = set()

    def __setitem__(self, name: str, positions: Tensor) -> None:
        known = positions.numel() > 0 and not positions.is_meta and bool((positions >= 0).all())
        if known:
            self._check(positions, f"loki_positions.{name}")
        super().__setitem__(name, positions)
        self.known = self.known | {name} if known else self.known - {name}

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.known.discard(name)

    def require(self, name: str) -> Tensor:
        """The rows [k] int64 of adapter `name`; ValueError where its file has not been loaded."""
        if name not in self.known:
            raise ValueError(f"adapter {name!r} has no positions: its file, which holds them, has not been loaded")
        positions: Any = self._buffers[name]
        return hooks.onload(self, name, positions) if positions.is_meta and hooks.HOOK in vars(self) else positions

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a tensor of adapter `name` as transformers does when it loads one."""
        if isinstance(value, Tensor) and name in self:
            self._check(value, f"loki_positions.{name}")
            self.known.add(name)
        super().__setattr__(name, value)

    def _check(self, positions: Tensor, key: str) -> None:
        try:
            check_positions(positions, self.out_features)
        except ValueError as error:
            raise ValueError(f"{key}: {error}; is this an adapter of another model?") from error

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        for name in self:
            if prefix + name in state_dict:
                self._check(state_dict[prefix + name], prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.known |= {name for name in self if prefix + name in state_dict}
