"""Which rows LoKI trains: the definition read again plainly, ties, strategies, bad input, the positions file."""

import json
import time

import pytest
import torch

from gci_kernels.loki import read_positions, select, selection, write_positions


def plainly(scores: torch.Tensor, quota: float, strategy: str) -> list[list[int]]:
    """The definition, sample by sample: Python's sort is stable, so of equal scores the lower index comes first."""
    samples, layers, out = scores.shape
    if strategy == "layer_balanced":
        return [named_most(scores[:, layer].tolist(), int(out * quota / 100)) for layer in range(layers)]
    sign = -1 if strategy == "global_highest" else 1
    chosen = named_most((sign * scores).reshape(samples, -1).tolist(), int(layers * out * quota / 100))
    return [[row % out for row in chosen if row // out == layer] for layer in range(layers)]


def named_most(samples: list[list[float]], k: int) -> list[int]:
    counts = [0] * len(samples[0])
    for scores in samples:
        for row in sorted(range(len(scores)), key=scores.__getitem__)[:k]:
            counts[row] += 1
    return sorted(sorted(range(len(counts)), key=lambda row: -counts[row])[:k])


@pytest.mark.parametrize("strategy", selection.STRATEGIES)
@pytest.mark.parametrize("quota", [2.5, 10, 33.3, 99, 100])
@pytest.mark.parametrize("values", [2, 7, None])
def test_definition(monkeypatch, strategy, quota, values):
    scores = torch.randn(9, 4, 50) if values is None else torch.randint(values, (9, 4, 50)) - 1.0
    scores[scores == 0] *= -1  # 0 and -0 are the same score
    expected = plainly(scores, quota, strategy)
    assert select(scores, quota, strategy) == expected
    assert select(scores.double(), quota, strategy) == expected
    monkeypatch.setattr(selection, "CHUNK", 120)
    assert select(scores.transpose(0, 1).contiguous().transpose(0, 1), quota, strategy) == expected


@pytest.mark.smoke
def test_strategies_choose_what_they_say():
    scores = torch.arange(24.0).reshape(1, 3, 8)
    assert select(scores, 25) == [[0, 1]] * 3
    assert select(scores, 25, "global_lowest") == [[0, 1, 2, 3, 4, 5], [], []]
    assert select(scores, 25, "global_highest") == [[], [], [2, 3, 4, 5, 6, 7]]


def test_samples_vote():
    """Row 3 is often low, row 0 once much lower than all: it is counts that decide, not sums."""
    scores = torch.tensor([[[-1e6, 2, 3, 1.0]], [[4, 3, 2, 1.0]], [[4, 3, 2, 1.0]]])
    assert select(scores, 25) == select(scores, 25, "global_lowest") == [[3]]


def test_infinite_scores_are_ranked():
    scores = torch.tensor([[[torch.inf, 0, -torch.inf, 1]]])
    assert select(scores, 50) == [[1, 2]]
    assert select(scores, 50, "global_highest") == [[0, 3]]


SCORES = torch.zeros(2, 3, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quota": 0}, "above 0 and at most 100 percent, got 0"),
        ({"quota": -1}, "got -1"),
        ({"quota": 100.1}, "got 100.1"),
        ({"quota": float("nan")}, "got nan"),
        ({"quota": 4.9}, "4.9 percent of 20 rows is less than one row"),
        ({"strategy": "lowest"}, "strategy='lowest' is unknown; allowed: 'layer_balanced'"),
        ({"scores": SCORES[0]}, r"\[samples, layers, out\]"),
        ({"scores": SCORES[:0]}, "at least one of each"),
        ({"scores": SCORES.long()}, "int64"),
        ({"scores": torch.where(torch.arange(20) == 7, torch.nan, SCORES)}, "NaN"),
        ({"scores": torch.where(torch.arange(20) == 7, torch.nan, SCORES), "strategy": "global_lowest"}, "NaN"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        select(**{"scores": SCORES, "quota": 10} | arguments)


def test_a_list_of_scores_is_refused_by_name():
    with pytest.raises(TypeError, match=r"scores must be a tensor \[samples, layers, out\], got list"):
        select(SCORES.tolist(), quota=10)


def test_positions_file(tmp_path):
    path = tmp_path / "positions.json"
    write_positions([[3, 1, 2], [], [0]], path)
    assert json.loads(path.read_text()) == [[1, 2, 3], [], [0]]
    assert read_positions(path) == [[1, 2, 3], [], [0]]
    # As published: indented, in the order of how often a row was named.
    path.write_text(json.dumps([[30, 4, 11], [2, 9, 1]], indent=4))
    assert read_positions(str(path)) == [[4, 11, 30], [1, 2, 9]]
    before = path.read_text()
    with pytest.raises(ValueError, match="twice"):
        write_positions([[1, 1]], path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[1, 2]", "no JSON file"),
        ('{"0": [1]}', "a list of row indices for each layer"),
        ("[1, 2]", "a list of row indices for each layer"),
        ("[]", "at least one row"),
        ("[[], []]", "at least one row"),
        ("[[1], [2, 2]]", "layer 1 names a row twice"),
        ("[[1], [-2]]", "layer 1 must list row indices from 0, got -2"),
        ("[[1.0]]", "got 1.0"),
        ("[[true]]", "got True"),
        ('["12"]', "got '1'"),
    ],
)
def test_bad_positions_file(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_positions(tmp_path / "x.json")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", selection.STRATEGIES)
def test_a_thousand_samples_of_a_large_model_within_seconds(strategy):
    scores = torch.randn(1000, 32, 4096)
    start = time.process_time()
    select(scores, 10, strategy)
    assert time.process_time() - start < 60
