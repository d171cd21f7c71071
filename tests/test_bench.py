"""The benchmark: a whole run on a tiny random Llama."""

import argparse
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from toy_bench import wrong_by

import gci_kernels
from gci_kernels.bench import cases, command, readme, report
from gci_kernels.bench.budget import LEAST_ROUNDS
from gci_kernels.bench.products import Rates

pytestmark = pytest.mark.usefixtures("one_thread")

FIXED = ("--rounds", "2", "--seq", "16", "--new-tokens", "4")


@pytest.fixture(autouse=True)
def small_layers(monkeypatch) -> None:
    monkeypatch.setattr(command, "SHRINKS", {"quick": (64, 32), "full": (32, 16)})


def bench(*options: str, quick: bool = True) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args(["--model", "random-llama", *["--quick"] * quick, *options]))


@pytest.mark.usefixtures("kept_copies")
@pytest.mark.parametrize("method", cases.METHODS)
def test_run_prints_tables_and_writes_json_and_a_picture(method: str, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    output, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    dtypes = ("--dtype", "float32", "bfloat16")
    assert bench(*FIXED, *dtypes, "--method", method, "--json", str(output), "--plot", str(picture)) == 0
    shown = capsys.readouterr().out
    for words in ("frozen base", "eager PyTorch", "gci_kernels", "adapter tax", "peak memory", "saved for backward"):
        assert words in shown
    assert f"One {report.METHODS[method]} layer" in shown and f"with {report.METHODS[method]} (" in shown
    for words in ("10% of the rows trained", "copies of weights, kept"):
        assert (words in shown) == (method == "loki")
    assert "left out" not in shown and "Less was measured" not in shown

    result = json.loads(output.read_text())
    assert result["schema"] == command.SCHEMA and result["left_out"] == result["shrunk"] == []
    assert {"machine", "versions", "commit", "settings", "layers", "models"} <= result.keys()
    assert result["machine"]["threads"] == torch.get_num_threads() and result["machine"]["cores"] >= 1
    assert result["versions"]["torch"] == torch.__version__
    assert result["products"].keys() == {"float32", "bfloat16"}
    assert [model["dtype"] for model in result["models"]] == ["float32", "bfloat16"]
    assert [part in model for model in result["models"] for part in report.TIMED] == [True, True, False] * 2
    for timed in (*result["layers"], *(model[part] for model in result["models"] for part in ("train", "generate"))):
        assert timed["seconds"].keys() == {"frozen", "eager", "gci"} and timed["tax"].keys() == {"eager", "gci"}
        assert all(len(seconds["samples"]) == 2 for seconds in timed["seconds"].values())
    for model in result["models"]:
        assert model["generate"]["of"] == 4 and model["trainable"] > 0
        train = model["train"]
        assert (train["batch"], train["seq"], train["tokens"]) == (2, 16, 2 * 16)
        assert train["peak_memory"].keys() == {"frozen", "eager", "gci"}
        assert 0 < train["saved_by_adapters"]["gci"] <= train["saved_by_adapters"]["eager"]
        copies = 2 * 64 * 160 * (4 if model["dtype"] == "float32" else 2)  # of both layers' down_proj
        assert train["copies"] == {"frozen": 0, "eager": 0, "gci": copies if method == "loki" else 0}
        rate, seconds = train["tokens_per_second"]["gci"]["samples"], train["seconds"]["gci"]["samples"]
        assert rate == pytest.approx([32 / value for value in seconds])

    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(header[16:20], "big") == 1200


def test_without_time_a_run_takes_the_least_of_everything_and_says_so(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(command, "SECONDS", {"full": 0.0})
    output = tmp_path / "bench.json"
    assert bench("--dtype", "float32", "--json", str(output), quick=False) == 0
    result, captured = json.loads(output.read_text()), capsys.readouterr()
    (layer,), (model,) = result["layers"], result["models"]
    assert layer["case"]["tokens"] == 2048 // 32
    assert (model["train"]["batch"], model["train"]["seq"]) == (2, command.LEAST_SEQ)
    assert model["generate"]["of"] == model["generate_many"]["of"] == command.LEAST_NEW_TOKENS
    for timed in (layer, *(model[part] for part in report.TIMED)):
        assert len(timed["seconds"]["frozen"]["samples"]) == LEAST_ROUNDS
    less = {each["what"]: (each["wanted"], each["used"]) for each in result["shrunk"]}
    assert less["train step"] == ("2x256", "2x8") and less["trials of the model's gate"] == (3, 1)
    assert less["rounds of training"] == (10, 2) and less["new tokens, generating 8 sequences together"] == (32, 4)
    shown = " ".join(captured.out.split())
    assert "Less was measured, to end within 15 minutes. float32: layer 64 tokens, 64 to 64, not 128" in shown
    assert "train step 2x8, not 2x256;" in shown and "batch 2x8" in shown and "Medians of 2 inter" in shown
    steps = [line.split("  [")[0] for line in captured.err.splitlines()]
    named = [
        "loading random-llama", "checking one layer", "timing one layer", "finding the size of a train step",
        "checking the loss and gradients of 16 tokens", "training, 2x8 tokens", "generating",
        "generating 8 sequences together",
    ]  # fmt: skip
    assert [step for step in steps if step in {f"float32: {what}" for what in named}] == [
        f"float32: {what}" for what in named
    ]


def test_what_the_user_asks_for_does_not_shrink(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(command, "SECONDS", {"quick": 0.0})
    output = tmp_path / "bench.json"
    sizes = ("--rounds", "3", "--batch", "3", "--seq", "24", "--new-tokens", "9")
    assert bench(*sizes, "--dtype", "float32", "--json", str(output)) == 0
    result = json.loads(output.read_text())
    (layer,), (model,) = result["layers"], result["models"]
    assert (model["train"]["batch"], model["train"]["seq"], model["generate"]["of"]) == (3, 24, 9)
    for timed in (layer, model["train"], model["generate"]):
        assert len(timed["seconds"]["frozen"]["samples"]) == 3
    assert {each["what"] for each in result["shrunk"]} == {"layer", "trials of the model's gate"}


@pytest.mark.parametrize(("fixed", "size"), [("--seq", (1, 40)), ("--batch", (5, 8))])
def test_of_a_train_step_that_does_not_shrink_that_is_given(monkeypatch, tmp_path, capsys, fixed: str, size) -> None:
    monkeypatch.setattr(command, "SECONDS", {"quick": 0.0})
    output = tmp_path / "bench.json"
    given = str(size[1] if fixed == "--seq" else size[0])
    assert bench(fixed, given, "--model-only", "--dtype", "float32", "--json", str(output)) == 0
    train = json.loads(output.read_text())["models"][0]["train"]
    assert (train["batch"], train["seq"]) == size


@pytest.mark.parametrize("forced", [False, True])
def test_a_dtype_for_which_no_time_is_left_is_named(monkeypatch, tmp_path: Path, capsys, forced: bool) -> None:
    monkeypatch.setattr(command, "SECONDS", {"quick": 0.0})
    monkeypatch.setattr(command, "product_rates", lambda dtype: Rates(1.0, 1.0))
    output = tmp_path / "bench.json"
    both = ["float32", "bfloat16"]
    assert bench("--layers-only", "--json", str(output), *(["--dtype", *both] * forced)) == 0
    result, shown = json.loads(output.read_text()), capsys.readouterr().out
    assert [layer["case"]["dtype"] for layer in result["layers"]] == (both if forced else both[:1])
    assert result["out_of_time"] == both[1:] * (not forced) and result["left_out"] == []
    assert ("bfloat16 was left out: the time was used up before it." in shown) != forced


SLOW = {"float32": Rates(100.0, 90.0), "bfloat16": Rates(80.0, 2.5), "float16": Rates(1.0, 1.0)}


@pytest.mark.parametrize("forced", [False, True])
def test_a_dtype_that_the_processor_multiplies_slowly_is_left_out_and_named(
    monkeypatch, tmp_path: Path, capsys, forced: bool
) -> None:
    monkeypatch.setattr(command, "product_rates", lambda dtype: SLOW[str(dtype).removeprefix("torch.")])
    output = tmp_path / "bench.json"
    assert bench("--layers-only", "--json", str(output), *(("--dtype", "bfloat16") * forced)) == 0
    result, shown = json.loads(output.read_text()), " ".join(capsys.readouterr().out.split())
    assert [layer["case"]["dtype"] for layer in result["layers"]] == ["bfloat16" if forced else "float32"]
    assert result["products"]["bfloat16"] == {"forward": 80.0, "dx": 2.5}
    assert result["left_out"] == [] if forced else ["bfloat16"]
    told = "bfloat16 was left out: PyTorch multiplies it slowly here (GFLOP/s of a core, forward and dX: "
    assert (told + "bfloat16 80.0 and 2.50, float32 100 and 90.0); --dtype bfloat16 measures it." in shown) != forced


@pytest.mark.smoke
def test_run_shows_no_times_when_the_gate_fails(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(cases.ops, "loramoe_linear", wrong_by(1.001, "y"))
    output = tmp_path / "bench.json"
    assert bench(*FIXED, "--layers-only", "--dtype", "float32", "--json", str(output)) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and not output.exists()
    assert "gate failed" in shown.err and "gci_kernels: y differs" in shown.err


def test_every_layer_step_finds_other_rows(monkeypatch, capsys) -> None:
    right, seen = gci_kernels.ops.loki_linear, []

    def watched(x, weight, bias, active, positions, **options):
        seen.append((active.detach().clone(), options["merged"]))
        return right(x, weight, bias, active, positions, **options)

    monkeypatch.setattr(cases.ops, "loki_linear", watched)
    monkeypatch.setattr(command, "SHRINKS", {"quick": (32,)})
    assert bench(*FIXED, "--method", "loki", "--layers-only", "--dtype", "float32") == 0
    assert len(seen) == 2 + 1 + 2  # the gate's, the warm-up and the timed ones
    for (before, kept), (after, same) in zip(seen, seen[1:], strict=False):
        assert torch.equal(before, -after) and kept is same


def test_parts_can_be_left_out(capsys) -> None:
    assert bench(*FIXED, "--layers-only", "--dtype", "float32") == 0
    assert "train step, tokens/s" not in capsys.readouterr().out
    assert bench(*FIXED, "--model-only", "--dtype", "float32") == 0
    assert "One LoRAMoE layer" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "x.png", "--layers-only"], "leave out --layers-only"),
        (["--json", "no/such/folder/x.json"], "folder does not exist"),
        (["--rounds", "0"], "2"),
        (["--layers-only", "--model-only"], "2"),
    ],
)
def test_bad_options_end_the_run_before_it_starts(options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        bench(*options)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_results_that_cannot_be_written_end_the_run_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="^/proc/x.json: its folder cannot be written: No such file"):
        bench("--json", "/proc/x.json")
    with pytest.raises(SystemExit, match=f"^{tmp_path}: Is a directory$"):
        bench("--json", str(tmp_path))


def test_sizes_are_shown_in_units() -> None:
    shown = [report._bytes(size) for size in (None, 12, 2048, 3 << 20, 5 << 30)]
    assert shown == ["not known here", "12 B", "2.0 KiB", "3.0 MiB", "5.00 GiB"]


def test_an_adapters_size_in_words() -> None:
    """Experts are named where there are some, whose method it may be; the terminal and the documents say the same."""
    for method, size, words in (
        ("lora", {"rank": 16, "num_experts": 1}, "LoRA, rank 16"),
        ("loramoe", {"rank": 4, "num_experts": 8}, "LoRAMoE, 8 experts of rank 4"),
        ("loki", {"quota": 10}, "LoKI, 10% of the rows trained"),
    ):
        layers = [{"case": {"method": method, **size}}]
        assert readme._adapter({"settings": {"method": method}, "layers": layers}) == words
    assert report.adapter_size({"method": "another", "rank": 4, "num_experts": 3}) == "3 experts of rank 4"


def test_tables_fit_eighty_columns(monkeypatch) -> None:
    one = {"median": 12345.6, "low": 12000.0, "high": 12700.0}
    timed = {"seconds": {name: one for name in report.COLUMNS}, "tokens_per_second": {}, "speedup": one}
    timed["tax"] = {"eager": one, "gci": one}
    timed["tokens_per_second"] = timed["seconds"]
    sizes = {name: 3 << 30 for name in report.COLUMNS}
    kept = dict.fromkeys(("peak_memory", "saved", "saved_by_adapters", "copies"), sizes)
    train = {**timed, **kept, "batch": 2, "seq": 256}
    model = dict(name="m", parameters=1e9, trainable=1e6, dtype="bfloat16", train=train)
    model |= {"generate": {**timed, "batch": 1}, "generate_many": {**timed, "batch": 8}}
    result = {"settings": {"method": "loramoe"}}
    console = Console(width=80, file=io.StringIO())
    console.print(report.model_table(result, model))
    shown = console.file.getvalue()
    assert "frozen base" in shown and "…" not in shown and "generation of 8 together, tokens/s" in shown
