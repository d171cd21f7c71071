"""The forgetting benchmark's learning rates, summary and report, from results that are made up."""

import json

import pytest
from toy_forgetting import POINTS

from gci_kernels.bench.forgetting import rates, report
from gci_kernels.bench.forgetting.methods import EAGER, METHODS


def reaching(lowest_that_does, asked):
    """Whether a rate gets there, where higher ones do; `asked` takes what was tried."""

    def reaches(rate):
        asked.append(rate)
        return rate >= lowest_that_does

    return reaches


@pytest.mark.parametrize(
    "limit, start, found, tried",
    [
        (2e-4, 2e-4, 2e-4, [2e-4, 1e-4]),
        (5e-5, 2e-4, 5e-5, [2e-4, 1e-4, 5e-5, 2e-5]),
        (4e-4, 1e-4, 5e-4, [1e-4, 2e-4, 5e-4]),
        (0.0, 2e-5, 1e-5, [2e-5, 1e-5]),
        (1.0, 2e-3, None, [2e-3, 5e-3]),
    ],
)
def test_the_lowest_rate_that_reaches_the_target(limit, start, found, tried):
    asked = []
    assert rates.lowest(reaching(limit, asked), start) == found and asked == tried


def test_every_method_begins_with_a_rate_of_the_grid():
    """The rule is one for all, and what is compared with a method's own ingredient has that method's rate."""
    assert all(method.learning_rate in rates.GRID for method in METHODS.values())
    assert METHODS["lora_rega"].learning_rate == METHODS["lora"].learning_rate
    assert (
        METHODS["loramoe_balance"].learning_rate
        == METHODS["loramoe"].learning_rate
        == EAGER["loramoe_eager"].learning_rate
    )


def result(method, seed, kl, reached=True):
    """A run as runs.py writes it."""
    points = [vars(point) for point in POINTS]
    return {
        "method": method, "title": (METHODS | EAGER)[method].title, "seed": seed, "learning_rate": 1e-3,
        "trainable": 1000, "points": points,
        "matched": {"step": 6, "tokens": 150.0, "kl_texts": kl, "kl_own": 2 * kl, "general_loss": 2 + kl}
        if reached else None,
        "answers": {name: 0.5 for name in report.ANSWERS}, "losses": [1.0] * 4, "tokens": [50, 60, 80, 90],
        "seconds": [9.0, 9.0, 0.5, 1.0], "memory": {"weights": 10, "optimizer": 20, "step": 30},
        "gates": [[0.3, 0.2], [0.2, 0.3]] if "loramoe" in method and method in METHODS else None, "mixture": None,
        "commit": {"sha": "0123456789abcdef", "changed": False},
    }  # fmt: skip


UNTOUCHED = {"points": [vars(POINTS[0])], "answers": {name: 0.25 for name in report.ANSWERS}}


def all_results():
    """REGA's claim holds in both seeds, LoRAMoE's over LoRA in one, LoKI over LoRA in none; full misses the target."""
    kl = {"lora_rega": (0.1, 0.1), "lora": (0.3, 0.4), "loramoe": (0.2, 0.5), "loki_10": (0.9, 0.9)}
    return [
        result(name, seed, kl.get(name, (0.6, 0.6))[seed], reached=name != "full")
        for name in METHODS
        for seed in (0, 1)
    ] + [result("loramoe_eager", 0, 0.2)]


def test_claims_need_every_seed():
    made = report.summary(UNTOUCHED, all_results())
    verdicts = {(c["lower"], c["higher"]): report.verdict(c["found"]["kl_texts"]) for c in made["claims"]}
    assert verdicts["lora_rega", "lora"] == "appears"
    assert verdicts["loramoe", "lora"] == "in 1 of 2 seeds"
    assert verdicts["loki_10", "lora"] == "reversed"
    assert verdicts["loramoe", "full"] == "not compared"
    assert len(made["claims"]) == len(report.CLAIMS)


def test_the_summary_means_over_seeds():
    row = report.summary(UNTOUCHED, all_results())["rows"]["lora"]
    assert row["kl_texts"]["mean"] == pytest.approx(0.35) and row["kl_texts"]["spread"] == pytest.approx(
        0.0707, abs=1e-4
    )
    assert row["general_loss"]["mean"] == pytest.approx(0.35) and row["reached"] == row["runs"] == 2
    assert row["tokens_per_second"]["mean"] == pytest.approx((80 / 0.5 + 90) / 2)
    assert row["memory"]["mean"] == 60


@pytest.fixture
def whole():
    return {
        "machine": {"cpu": "a CPU", "threads": 2}, 
        "versions": dict.fromkeys(("python", "gci_kernels", "torch", "transformers", "peft"), "1"),
        "settings": {"schedule": {"target": 1.0, "steps": 8}, "seeds": [0, 1]}, "untouched": UNTOUCHED,
        "summary": report.summary(UNTOUCHED, all_results()), "runs": all_results(),
        "trials": [result("lora", 100, 0.7, reached=False), result("lora", 100, 0.9)],
    }  # fmt: skip


def test_the_report_names_every_method_and_what_was_missed(whole):
    text = report.markdown(json.loads(json.dumps(whole)))
    table = text.split("## ")[0]
    assert all(f"| {method.title} |" in table for method in METHODS.values())
    assert f"| {METHODS['full'].title} | 0.0M | 0 of 2 | – | – | – | – |" in table
    assert "| +0.350 ±0.071 | 0.350 ±0.071 | 0.700 ±0.141 |" in table and "commit 0123456789" in text
    assert (
        EAGER["loramoe_eager"].title in text.split("## What training cost")[1]
        and EAGER["loramoe_eager"].title not in table
    )
    assert "| 0.2000 ±0.0000 |" in text.split("groups of experts")[1]
    assert all(claim[1] in text for claim in report.CLAIMS)
    assert "Kept trials, commit 0123456789:" in text
    assert text.split("## Learning rates")[1].splitlines()[6:8] == [
        "| LoRA r=32 | 0.001 | 1.000 | – | – | – |", "| LoRA r=32 | 0.001 | 1.000 | 6 | 0.900 | 1.800 |",
    ]  # fmt: skip


def test_a_report_without_trials_says_nothing_of_them(whole):
    assert "Learning rates" not in report.markdown(whole | {"trials": []})


def test_the_picture_is_drawn(whole, tmp_path):
    pytest.importorskip("matplotlib")
    from gci_kernels.bench.forgetting.plot import draw

    draw(whole, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 20_000
