"""Which knowledge vectors to train (LoKI, arXiv 2505.22120): those that the model's answers depend on least."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gci_kernels.files import write_whole

STRATEGIES = ("layer_balanced", "global_lowest", "global_highest")
# Scores that are ranked at a time; ranking needs a few times their memory.
CHUNK = 1 << 22


def select(scores: Tensor, quota: float, strategy: str = "layer_balanced") -> list[list[int]]:
    """The rows of each layer's projection to train.

    "layer_balanced": in every layer k = int(out * quota / 100) rows. Each sample names the layer's k lowest scores; the
    k rows named most often are kept. "global_lowest" and "global_highest" do the same over all layers together, with
    k = int(layers * out * quota / 100) rows and each sample naming its k lowest or highest: layers get unequal shares,
    perhaps none. Of equal scores, and of rows named equally often, the lower index comes first (globally: the lower
    layer, then the lower index); the published code leaves ties to an unstable sort. It also scales each sample's
    scores to 0..1 first, which changes no order.

    Args:
        scores: [samples, layers, out], floating point, as :func:`gci_kernels.loki.attribute` gives them; any device.
        quota: percent of the rows, above 0 and at most 100.
        strategy: "layer_balanced", "global_lowest" or "global_highest".

    Returns:
        For each layer, row indices in ascending order.

    Raises:
        TypeError: scores is no tensor.
        ValueError: an unknown strategy, scores of another shape or dtype or with NaN, a quota
            outside (0, 100] or too small for one row.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown; allowed: {', '.join(map(repr, STRATEGIES))}")
    if not 0 < quota <= 100:
        raise ValueError(f"quota must be above 0 and at most 100 percent, got {quota}")
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a tensor [samples, layers, out], got {type(scores).__name__}")
    if scores.dim() != 3 or scores.numel() == 0 or not scores.is_floating_point():
        got = f"{list(scores.shape)} {scores.dtype}"
        raise ValueError(f"scores must be [samples, layers, out] in floating point, at least one of each, got {got}")
    _, layers, out = scores.shape
    if strategy == "layer_balanced":
        return [_most_named(scores[:, layer], int(out * quota / 100), quota).tolist() for layer in range(layers)]
    k = int(layers * out * quota / 100)
    chosen = _most_named(scores.flatten(1), k, quota, highest=strategy == "global_highest")
    return [(chosen[chosen // out == layer] % out).tolist() for layer in range(layers)]


def _most_named(scores: Tensor, k: int, quota: float, *, highest: bool = False) -> Tensor:
    """Ascending indices [k] of the columns that most rows of `scores` [samples, n] have among their k lowest."""
    if k == 0:
        raise ValueError(f"quota={quota} percent of {scores.shape[1]} rows is less than one row")
    counts = torch.zeros(scores.shape[1], dtype=torch.int64, device=scores.device)
    for part in scores.split(max(1, CHUNK // scores.shape[1])):
        counts += _lowest(-part if highest else part, k).sum(0)
    return counts.argsort(descending=True, stable=True)[:k].sort().values


def _lowest(scores: Tensor, k: int) -> Tensor:
    """A mask [samples, n] bool of the k lowest scores in each row; of equal scores the first are taken."""
    if torch.isnan(scores).any():
        raise ValueError("scores hold NaN: the samples that gave them can't be ranked")
    limit = scores.kthvalue(k, dim=-1, keepdim=True).values
    chosen, equal = scores < limit, scores == limit
    remaining = k - chosen.sum(-1, keepdim=True, dtype=torch.int32)
    return chosen | (equal & (equal.cumsum(-1, dtype=torch.int32) <= remaining))


def write_positions(positions: Sequence[Sequence[int]], path: str | os.PathLike) -> None:
    """Write positions as the published JSON: a list of row indices for each layer, here ascending.

    An existing file is replaced atomically.

    Raises:
        ValueError: positions that are not lists of different row indices, or no index at all.
    """
    lines = ",\n".join(json.dumps(sorted(rows)) for rows in _checked(positions, "positions"))
    write_whole(Path(path), f"[\n{lines}\n]\n")


def read_positions(path: str | os.PathLike) -> list[list[int]]:
    """Positions from a JSON file, published or ours, each layer's in ascending order.

    Published files list rows in the order of how often they were named.

    Raises:
        ValueError: no list of lists of row indices, an index twice in a layer, or no index at all.
    """
    try:
        found = json.loads(Path(path).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    return [sorted(rows) for rows in _checked(found, str(path))]


def _checked(positions: object, name: str) -> Sequence[Sequence[int]]:
    if not isinstance(positions, Sequence) or not all(isinstance(rows, Sequence) for rows in positions):
        raise ValueError(f"{name} must be a list of row indices for each layer")
    if not any(len(rows) for rows in positions):
        raise ValueError(f"{name} must name at least one row")
    for layer, rows in enumerate(positions):
        bad = [row for row in rows if type(row) is not int or row < 0]
        if bad:
            raise ValueError(f"{name}: layer {layer} must list row indices from 0, got {bad[0]!r}")
        if len(set(rows)) < len(rows):
            raise ValueError(f"{name}: layer {layer} names a row twice")
    return positions
