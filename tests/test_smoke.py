"""`pytest -m smoke` touches every part of the package: each has a test of this mark."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# The parts, by the file that holds most of their tests.
PARTS = (
    "adapter_cache", "alora", "alora_tuner", "attention", "attention_native", "attribution", "balance", "bench",
    "bottleneck", "central_prompt", "convert", "convert_loramoe", "decode", "decode_layers", "dropout", "forgetting",
    "gate", "golden", "hardware", "loki_tuner", "loramoe_tuner", "merged_rows", "mixed_batches", "native", "patch",
    "peft_targets", "python_versions", "rega_cli", "roofline", "row_linear", "scores", "selection", "sequence", "split",
    "training", "triton_compile", "tune",
)  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_every_part_has_a_smoke_test(part):
    assert "@pytest.mark.smoke\n" in (TESTS / f"test_{part}.py").read_text()
