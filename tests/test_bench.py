"""The benchmark: its clock, its byte counts, its baselines, its gate, and a whole run on a tiny random Llama."""

import argparse
import io
import json
import sys
import time
from pathlib import Path

import golden_data
import pytest
import torch
from rich.console import Console
from torch import nn

import gci_kernels
from gci_kernels import native
from gci_kernels.accuracy import relative_error
from gci_kernels.bench import cases, command, correctness, models, report, timing, variants
from gci_kernels.bench.baselines import EagerLoKILinear, EagerLoRAMoELinear, adapter_leaves, collect_grads, stack
from gci_kernels.bench.budget import LEAST_ROUNDS
from gci_kernels.bench.cases import LayerCase, layer_variants, make_case, make_inputs
from gci_kernels.bench.correctness import CorrectnessError, check_layer, check_model
from gci_kernels.bench.products import Rates
from gci_kernels.ops import MergedRows
from gci_kernels.ops.bottleneck import choose_plan
from gci_kernels.ops.row_linear import choose_form

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


# The clock and the byte counts


def test_interleave_rotates_the_order_and_leaves_warmup_out() -> None:
    calls: list[str] = []
    rounds: list[int] = []
    fns = {name: lambda name=name: calls.append(name) for name in "abc"}
    result = timing.interleave(fns, device=CPU, rounds=3, warmup=1, advance=lambda *_: rounds.append(len(calls)))
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


def test_interleave_calls_what_comes_before_a_function_outside_its_time() -> None:
    calls: list[str] = []
    fns = {name: lambda name=name: calls.append(name) for name in "ab"}
    before = {"b": lambda: (calls.append("-"), time.sleep(0.02))}
    result = timing.interleave(fns, device=CPU, rounds=1, warmup=1, before=before)
    assert "".join(calls) == "a-b-ba" and all(measured.median < 0.02 for measured in result.values())


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


def test_saved_bytes_leaves_out_kept_copies() -> None:
    linear = nn.Linear(16, 8, bias=False).requires_grad_(False)
    linear.merged_rows = MergedRows()
    active, positions = torch.randn(2, 16, requires_grad=True), torch.tensor([3, 5])
    linear.register_buffer("positions", positions)
    linear.active = nn.Parameter(active.detach())
    x = torch.randn(32, 16)

    def forward() -> torch.Tensor:
        return gci_kernels.ops.loki_linear(x, linear.weight, None, linear.active, positions, merged=linear.merged_rows)

    assert timing.kept_copies(linear) == []
    for _ in range(2):  # the first call makes the copy
        assert timing.saved_bytes(forward, linear) == x.nbytes
    assert [copy.shape for copy in timing.kept_copies(linear)] == [(8, 16)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no other system keeps this mark")
def test_peak_memory_sees_what_was_freed_again() -> None:
    def fn() -> None:
        torch.ones(16 << 20).sum()

    fn()
    assert 60 << 20 < timing.peak_memory(fn, CPU) < 80 << 20
    assert timing.peak_memory(lambda: None, CPU) < 4 << 20


# The eager baselines


@pytest.mark.parametrize("name", golden_data.LOKI)
def test_eager_loki_layer_is_the_published_one(name: str) -> None:
    data = golden_data.load(name)[1]
    positions, bias = data["positions"], data.get("bias")
    active_bias = None if bias is None else bias[positions]
    layer = EagerLoKILinear(data["weight"], bias, data["weight"][positions], positions, active_bias)
    x = data["x"].requires_grad_()
    y = layer(x)
    y.backward(data["dy"])
    leaves = adapter_leaves(layer)
    assert leaves.keys() == ({"active"} if bias is None else {"active", "active_bias"})
    assert sum(parameter.requires_grad for parameter in layer.parameters()) == len(leaves)
    gradients = {"dx": x.grad, **{f"d{role}": leaf.grad for role, (leaf,) in leaves.items()}}
    for tensor, actual in {"y": y, **gradients}.items():
        assert relative_error(actual, data[tensor]) < 1e-10, tensor


def test_eager_loki_layer_replaces_rows_in_any_order() -> None:
    """Golden data has the base's own rows in ascending order; here both are others."""
    weight, bias, active, active_bias = (torch.randn(*shape).double() for shape in ((9, 5), (9,), (3, 5), (3,)))
    positions, x = torch.tensor([7, 0, 4]), torch.randn(2, 6, 5).double()
    layer = EagerLoKILinear(weight, bias, active, positions, active_bias)
    expected = nn.functional.linear(
        x, weight.index_copy(0, positions, active), bias.index_copy(0, positions, active_bias)
    )
    assert relative_error(layer(x), expected) < 1e-12


@pytest.mark.parametrize("name", golden_data.LORAMOE)
def test_eager_layer_is_the_published_one(name: str) -> None:
    settings, data = golden_data.load(name)
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
    return make_case(method, 33, 48, 40, dtype)


def test_cases_are_named_by_their_shapes() -> None:
    names = {case.name for case in cases.CASES if case.dtype == torch.float32}
    assert names == {
        "lora r=16 T=2048 2048x2048 float32",
        "loramoe 8x4 T=2048 2048x2048 float32",
        "alora r=16 4 heads T=2048 2048x2048 float32",
        "loki 10% T=2048 5504x2048 float32",
    }
    quick = cases.layer_case("loki", torch.bfloat16, torch.float32, shrink=2)
    assert quick.name == "loki 10% T=1024 2752x1024 bfloat16" and quick.adapter_dtype == torch.float32
    assert quick.rows == 102 and make_case("loki", 1, 4, 4, torch.float32).rows == 1


@pytest.mark.smoke
@pytest.mark.parametrize("method", cases.METHODS)
def test_variants_agree_in_float64(method: str) -> None:
    made = layer_variants(make_inputs(small_case(method, torch.float64), CPU))
    eager, gci = (made[name].results() for name in ("eager", "gci"))
    assert eager.keys() == gci.keys() and made["frozen"].results().keys() == {"y", "dx"}
    assert all(relative_error(gci[name], eager[name]) < 1e-12 for name in eager)


@pytest.mark.parametrize("method", cases.METHODS)
def test_change_leaves_no_number_of_an_adapter_and_twice_gives_all_back(method: str) -> None:
    for name, variant in layer_variants(make_inputs(small_case(method, torch.float32), CPU)).items():
        adapter = [leaf for role, leaves in variant.leaves.items() if role != "x" for leaf in leaves]
        first, x = [leaf.detach().clone() for leaf in adapter], variant.leaves["x"][0].detach().clone()
        assert bool(adapter) == (name != "frozen")
        variant.change()
        assert all((leaf != old).all() for leaf, old in zip(adapter, first, strict=True))
        assert torch.equal(variant.leaves["x"][0], x)
        variant.change()
        assert all(torch.equal(leaf, old) for leaf, old in zip(adapter, first, strict=True))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", cases.METHODS)
def test_layer_gate_passes(method: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(small_case(method, dtype), CPU)
    errors = check_layer(inputs, layer_variants(inputs))
    own = {"lora": {"dA", "dB"}, "loki": {"dactive"}}
    own |= {"loramoe": own["lora"] | {"drouter"}, "alora": own["lora"] | {"dqkv"}}
    assert set(errors) == {"y", "dx"} | own[method]
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


def keep_the_first_copy(monkeypatch) -> None:
    """A kept copy that is never renewed."""
    right = MergedRows.renewed

    def stale(self, frozen, *arguments):
        return self.copies()[0] if self.has(frozen.device) else right(self, frozen, *arguments)

    monkeypatch.setattr(MergedRows, "renewed", stale)


@pytest.fixture
def kept_copies(monkeypatch):
    """As where the processor multiplies bfloat16: LoKI then keeps a copy of W, which float32 products do without."""
    monkeypatch.setattr("gci_kernels.ops.row_linear.plan.upcast_from", lambda *_: None)


@pytest.mark.usefixtures("kept_copies")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_gate_stops_a_stale_copy(monkeypatch, dtype: torch.dtype) -> None:
    inputs = make_inputs(small_case("loki", dtype), CPU)
    keep_the_first_copy(monkeypatch)
    with pytest.raises(CorrectnessError, match="gci_kernels: y differs from float64"):
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


@pytest.fixture(scope="module", params=cases.METHODS)
def tiny(request) -> dict[str, nn.Module]:
    model, _ = models.load_model("random-llama:tiny", torch.float32, CPU)
    return variants.model_variants(model, request.param)


def test_model_variants_share_the_base_and_name_their_gradients_alike(tiny) -> None:
    ids = variants.random_ids(tiny["frozen"], 1, 8)
    for model in tiny.values():
        variants.train_step(model, ids)
    grads = collect_grads(tiny["gci"])
    roles = ("mlp.down_proj.A", "self_attn.o_proj.A", "mlp.down_proj.active")
    assert {f"model.layers.1.{role}" for role in roles} & grads.keys()
    assert grads.keys() == collect_grads(tiny["eager"]).keys()
    assert not collect_grads(tiny["frozen"])
    frozen, eager, gci = (
        {p.data_ptr() for name, p in model.named_parameters() if not p.requires_grad and ".frozen." not in name} - {0}
        for model in tiny.values()
    )
    taken_apart = {m.weight.data_ptr() for m in tiny["gci"].modules() if hasattr(m, "merged_rows")}  # LoKI's bases
    assert frozen == gci and frozen - taken_apart == eager


def test_every_timed_train_step_finds_other_weights_and_the_first_ones_come_back(tiny, monkeypatch) -> None:
    def weights(model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    first, seen = weights(tiny["gci"]), []
    step = variants.train_step

    def watched(model: nn.Module, ids: torch.Tensor) -> None:
        if model is tiny["gci"]:
            seen.append(weights(model))
        step(model, ids)

    monkeypatch.setattr(variants, "train_step", watched)
    shared = tiny["eager"].state_dict().keys() == tiny["gci"].state_dict().keys()  # LoRA: eager changes them too
    alone = {name: model for name, model in tiny.items() if name != "eager" or not shared}
    variants.measure_training(alone, batch=1, seq=4, rounds=3)
    assert len(seen) == 1 + 3  # peak memory's and the timed ones
    for before, after in zip(seen, seen[1:], strict=False):
        assert all(torch.equal(after[name], -before[name]) for name in first)
    assert all(torch.equal(weights(tiny["gci"])[name], first[name]) for name in first)


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


def test_a_tensor_of_the_model_gate_passes_by_most_of_its_trials() -> None:
    good, bad = ({"eager": 1.0, "gci": error, "bound": 2.0} for error in (1.0, 3.0))
    for trials, kept in (([good, bad, bad], bad), ([bad, good, good], good), ([good, bad], bad), ([good], good)):
        assert correctness._median_trial(trials) == kept


def test_model_gate_stops_a_stale_copy(monkeypatch) -> None:
    model, _ = models.load_model("random-llama:tiny", torch.float32, CPU)
    made = variants.model_variants(model, "loki")
    keep_the_first_copy(monkeypatch)
    with pytest.raises(CorrectnessError, match="gci_kernels: .* differs from float64"):
        check_model(made, variants.random_ids(model, 3, 16))


# A whole run

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


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("seq", (command.LEAST_SEQ, 16, 32, 64, 128, 256))
def test_the_gate_checks_the_plan_that_is_timed(dtype, isa, seq):
    gate, step = command.gate_tokens(2, seq), 2 * seq
    what = dict(dtype=dtype, device_type="cpu")
    assert len({choose_plan("auto", tokens=tokens, isa=isa, **what) for tokens in (gate, step)}) == 1
    assert len({choose_form("auto", tokens=tokens, share=0.1, keep=True, **what) for tokens in (gate, step)}) == 1
