"""`pytest -m smoke` touches every part of the package: each has a test of this mark."""

from pathlib import Path

TESTS = Path(__file__).parent
# The parts, by the file that holds most of their tests.
PARTS = (
    "adapter_cache", "alora", "alora_tuner", "attention", "attention_native", "attribution", "balance", "bench",
    "bottleneck", "budget", "central_prompt", "command", "convert", "convert_loramoe", "decode", "decode_layers",
    "docs", "dropout", "forgetting", "fused_lora", "gate", "golden", "hardware", "imports", "loki_files", "loki_tuner",
    "loramoe_tuner", "merged_rows", "mixed_batches", "native", "peft_targets", "published_loki", "python_versions",
    "rega_cli", "roofline", "row_linear", "scores", "selection", "sequence", "training", "triton_compile", "tune",
)  # fmt: skip


def test_every_part_has_a_smoke_test():
    without = [part for part in PARTS if "@pytest.mark.smoke\n" not in (TESTS / f"test_{part}.py").read_text()]
    assert not without
