"""Classes of transformers with each method, as the committed file says: some in every run, all in the slow one."""

import functools
import json
import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

import gci_kernels
from gci_kernels.bench.compatibility import __main__ as command
from gci_kernels.bench.compatibility import checks, sweep, table, tiny
from gci_kernels.tuners import ALoRALinear, LoKILinear, LoRAMoELinear
from gci_kernels.tuners.lora import FusedLoraLinear

pytestmark = pytest.mark.usefixtures("one_thread")

RESULT = json.loads((Path(__file__).parents[1] / "bench/results/compatibility.json").read_text(encoding="utf-8"))
ROWS = {row["name"]: row for row in RESULT["classes"]}
# A decoder, transposed weights, a hybrid, a mixture, an encoder beside the decoder, a vision tower beside it, mrope.
CHOSEN = (
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "JambaForCausalLM",
    "Qwen2MoeForCausalLM",
    "BartForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
)
LAYERS = {"lora": FusedLoraLinear, "loramoe": LoRAMoELinear, "alora": ALoRALinear, "loki": LoKILinear}


def outcomes(row: dict) -> dict | str:
    """What is compared of a row: sentences and versions may change."""
    if "methods" not in row:
        return "left out"
    return {method: (found["outcome"], found["targets"]) for method, found in row["methods"].items()}


@functools.cache
def base() -> tuple:
    model = tiny.tiny_model("LlamaForCausalLM")
    return model, checks.check_base(model)[1]


@pytest.mark.parametrize("name", CHOSEN)
def test_a_class(name):
    row = sweep.check_class(name)
    assert outcomes(row) == outcomes(ROWS[name]), row
    told = {method: found for method, found in row["methods"].items() if found["outcome"] == table.FAILS}
    assert not told
    assert row["inputs"] == ("image and text" if row["kind"] == "vision-language" else "text")


@pytest.mark.slow
def test_every_class():
    """The counts are those of the committed file, and nothing fails in it."""
    rows = sweep.sweep(
        list(tiny.classes()), table.METHODS, 2, lambda row, seconds: print(row["name"], f"{seconds:.1f} s")
    )
    changed = [row for row in rows if outcomes(row) != outcomes(ROWS[row["name"]])]
    assert not changed
    assert table.counts({"classes": rows}) == table.counts(RESULT)


def test_the_file_is_of_all_classes_and_methods():
    assert list(ROWS) == list(tiny.classes()) and len(ROWS) > 250
    assert {row["name"]: row["kind"] for row in ROWS.values()} == tiny.classes()
    for row in ROWS.values():
        assert "left_out" in row or list(row["methods"]) == list(table.METHODS)


# The checks can fail


def outcome(method: str) -> dict:
    return checks.check(*base(), method)


@pytest.mark.parametrize("method", table.METHODS)
def test_another_result_is_seen(method, monkeypatch):
    own = LAYERS[method].forward
    monkeypatch.setattr(LAYERS[method], "forward", lambda self, x, **kwargs: own(self, x, **kwargs) * (1 + 1e-3))
    found = outcome(method)
    assert found["outcome"] == table.FAILS and "logits differ" in found["why"]


@pytest.mark.parametrize("method", table.METHODS)
def test_another_gradient_is_seen(method, monkeypatch):
    own = LAYERS[method].forward

    def forward(self, x, **kwargs):
        y = own(self, x, **kwargs)
        return y + 1e-2 * (y - y.detach()) if torch.is_grad_enabled() else y

    monkeypatch.setattr(LAYERS[method], "forward", forward)
    found = outcome(method)
    assert found["outcome"] == table.FAILS and "gradient of" in found["why"]


@pytest.mark.parametrize("method", table.METHODS)
def test_other_tokens_are_seen(method, monkeypatch):
    """What goes wrong in a step of generation alone."""
    own = LAYERS[method].forward
    monkeypatch.setattr(
        LAYERS[method], "forward", lambda self, x, **kwargs: own(self, x, **kwargs) * (-1 if x.shape[1] == 1 else 1)
    )
    found = outcome(method)
    assert found["outcome"] == table.FAILS and "other tokens" in found["why"]


@pytest.mark.parametrize("method", table.METHODS)
def test_what_unpatch_leaves_is_seen(method, monkeypatch):
    own = gci_kernels.unpatch

    def unpatch(model):
        plain = own(model)
        with torch.no_grad():
            next(module for module in plain.modules() if isinstance(module, nn.Linear)).weight.mul_(1 + 1e-6)
        return plain

    monkeypatch.setattr(gci_kernels, "unpatch", unpatch)
    found = outcome(method)
    what = "the logits of PEFT's layers" if method == "lora" else "changed: "
    assert found["outcome"] == table.FAILS and found["why"].startswith(f"unpatch: {what}")


def test_a_refusal_is_told_from_an_error(monkeypatch):
    def refuse(model):
        raise ValueError("this model is not wanted")

    # A function of the package that raises is what a refusal is known by.
    monkeypatch.setattr(checks, "configs", lambda method: {"default": lambda model: gci_kernels.LoRAMoEConfig(r=0)})
    assert outcome("loramoe") == {
        "outcome": table.REFUSED, "targets": "default", "why": "patch: r must be at least 1, got 0"
    }  # fmt: skip
    monkeypatch.setattr(checks, "configs", lambda method: {"default": refuse})
    found = outcome("loramoe")
    assert (found["outcome"], found["why"]) == (table.FAILS, "patch: ValueError: this model is not wanted")


def test_an_adapter_without_effect_is_seen(monkeypatch):
    monkeypatch.setattr(checks, "randomize", lambda model: None)
    assert outcome("loki")["why"] == "forward: the adapter has no effect"


# Processes


def swept(names: list[str], **settings) -> list[dict]:
    times = []
    rows = sweep.sweep(names, ["lora"], 2, lambda row, seconds: times.append(seconds), **settings)
    assert len(times) == len(names)
    return rows


def test_classes_that_hang_or_crash_stop_no_other(monkeypatch):
    def check_class(name, methods):
        if name.startswith("GPT2"):
            time.sleep(60)
        if name.startswith("OPT"):
            os._exit(3)
        return {"name": name, "kind": "causal", "methods": {}}

    monkeypatch.setattr(sweep, "check_class", check_class)
    rows = swept(["GPT2LMHeadModel", "OPTForCausalLM", "LlamaForCausalLM"], seconds=2.0)
    assert [row.get("left_out") for row in rows] == ["takes more than 2 seconds", "its process ended with 3", None]


def test_what_cannot_be_made_or_run_is_left_out(monkeypatch):
    monkeypatch.setitem(tiny._EXTRA_FIELDS, "LlamaConfig", {"hidden_size": 30, "num_attention_heads": 4})
    assert sweep.check_class("LlamaForCausalLM")["left_out"].startswith("cannot be made tiny: ")
    monkeypatch.setitem(tiny._EXTRA_FIELDS, "LlamaConfig", {"hidden_act": "silu", "max_position_embeddings": 0})
    monkeypatch.setattr(sweep.checks, "check_base", lambda model: 1 / 0)
    assert sweep.check_class("LlamaForCausalLM")["left_out"].startswith("does not run by itself: ZeroDivisionError")


def test_the_command_writes_the_rows(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert command.main(["--only", "LlamaForCausalLM", "--method", "lora", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    (row,) = (row for row in written["classes"] if row["name"] == "LlamaForCausalLM")
    assert row["methods"] == {"lora": {"outcome": table.YES, "targets": "all-linear"}}
    assert written["versions"]["torch"] == torch.__version__
    assert "| causal | 2 of 2 | 2 |" in capsys.readouterr().out


# Tables and models


def test_tables():
    why = "patch: [no] *layers* here"
    methods = {
        "lora": {"outcome": table.YES, "targets": "all-linear"},
        "loramoe": {"outcome": table.YES, "targets": "all-linear"},
        "alora": {"outcome": table.REFUSED, "targets": "default", "why": why},
        "loki": {"outcome": table.FAILS, "targets": "default", "why": why},
    }
    result = {
        "versions": {"torch": "1", "transformers": "2", "peft": "3"}, "commit": None,
        "classes": [
            {"name": "A", "kind": "causal", "inputs": "text", "methods": methods},
            {"name": "B", "kind": "causal", "left_out": "cannot be made tiny"},
        ],
    }  # fmt: skip
    assert "| causal | 1 of 2 | 1 | 1 | 0; 1 refused | 0; 1 fails |" in table.summary(result)
    shown = table.every_class(result)
    assert "| `A` | text | yes | yes, all-linear | refused (1) | fails (1) |" in shown
    assert r"1. patch: \[no] \*layers\* here" in shown and "- `B`: cannot be made tiny" in shown


def test_a_tiny_config_keeps_one_layer_of_each_kind():
    config = tiny.tiny_config(LlamaConfig, hidden_act="gelu")
    assert (config.num_hidden_layers, config.hidden_size, config.hidden_act) == (2, 64, "gelu")
    hybrid = tiny.tiny_model("JambaForCausalLM").config
    assert len(set(hybrid.layers_block_type)) == hybrid.num_hidden_layers == 2
    first, second = (tiny.tiny_model("LlamaForCausalLM").state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
