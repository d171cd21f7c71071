"""The benchmark's gate: what is timed agrees with the other variants, or no time is shown."""

import pytest
import torch
from torch import nn
from toy_bench import wrong_by

from gci_kernels import native
from gci_kernels.accuracy import relative_error
from gci_kernels.bench import cases, command, correctness, models, variants
from gci_kernels.bench.baselines import adapter_leaves, collect_grads
from gci_kernels.bench.cases import LayerCase, layer_variants, make_case, make_inputs
from gci_kernels.bench.correctness import CorrectnessError, check_layer, check_model
from gci_kernels.ops import MergedRows
from gci_kernels.ops.bottleneck import choose_plan
from gci_kernels.ops.row_linear import choose_form

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("seq", (command.LEAST_SEQ, 16, 32, 64, 128, 256))
def test_the_gate_checks_the_plan_that_is_timed(dtype, isa, seq):
    gate, step = command.gate_tokens(2, seq), 2 * seq
    what = dict(dtype=dtype, device_type="cpu")
    assert len({choose_plan("auto", tokens=tokens, isa=isa, **what) for tokens in (gate, step)}) == 1
    assert len({choose_form("auto", tokens=tokens, share=0.1, keep=True, **what) for tokens in (gate, step)}) == 1
