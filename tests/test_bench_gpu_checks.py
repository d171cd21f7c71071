"""What `python -m bench.gpu` times is checked first: what is wrong gets no time, and the rest does."""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from gci_kernels import hardware
from gci_kernels.bench import gpu_cases, gpu_decode, gpu_plans, gpu_report, gpu_stages
from gci_kernels.bench.correctness import CorrectnessError
from gci_kernels.hardware import Shape
from gci_kernels.hardware.stages import Stage

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def spoil(monkeypatch, change: Callable[[str, Stage], Stage]) -> None:
    """The registered stages with the library in place of Triton, as `change`, which gets their names, returns them."""

    def spoilt(kernel: hardware.Kernel) -> hardware.Kernel:
        def stages(*arguments) -> dict[str, Stage]:
            made = kernel.stages(*arguments)
            return {name: change(name, by(stage, stage.implementations["aten"])) for name, stage in made.items()}

        return dataclasses.replace(kernel, stages=stages)

    monkeypatch.setattr(gpu_stages, "obstacle", lambda *_: None)
    monkeypatch.setattr(gpu_stages, "KERNELS", {name: spoilt(k) for name, k in hardware.KERNELS.items()})


def by(stage: Stage, triton: Callable) -> Stage:
    return stage._replace(implementations=stage.implementations | {"triton": triton})


def measured(method: str, shape: Shape, dtype: torch.dtype, form: str = "") -> list[dict]:
    """The entries of a layer's stages."""
    measurements = gpu_stages.stage_measurements(method, shape, dtype, CPU, 2, form)
    entries = [gpu_stages.guarded(*measurement) for measurement in measurements]
    assert all(entry["name"].startswith(f"{method} ") for entry in entries)
    return [entry | {"name": entry["name"].removeprefix(f"{method} ")} for entry in entries]


SMALL = Shape(32, 64, 64, 16, 0, 0)
ORDERS = {"adapter first", "base first"}


def test_a_wrong_kernel_gets_no_time(monkeypatch):
    def change(name: str, stage: Stage) -> Stage:
        right = stage.implementations["aten"]
        if name == "backward: dA":
            return by(stage, lambda t, dtype: tuple(result * 1.001 for result in right(t, dtype)))
        return by(stage, lambda t, dtype: 1 / 0) if name == "dropout" else stage

    spoil(monkeypatch, change)
    entries = {entry["name"]: entry for entry in measured("lora", SMALL, torch.float32)}
    assert "CorrectnessError: Triton differs from float64 by 1.0" in entries["backward: dA"]["error"]
    assert entries["dropout"]["error"].startswith("ZeroDivisionError")
    assert all("seconds" not in entries[name] for name in ("backward: dA", "dropout"))
    assert set(entries["backward: dX"]["seconds"]) == {"aten", "triton"} | ORDERS and len(entries) == 6


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_a_wrong_order_gets_no_time(monkeypatch, order):
    right = gpu_stages.ORDERS[order]
    monkeypatch.setitem(gpu_stages.ORDERS, order, lambda *operands: right(*operands) * 1.05)
    entries = {entry["name"]: entry for entry in measured("lora", SMALL, torch.bfloat16)}
    for name in ("forward: expand", "backward: dX"):
        assert f"CorrectnessError: {order.capitalize()} differs" in entries[name]["error"]
    assert not [name for name, entry in entries.items() if "error" in entry and order not in entry["error"].lower()]


def test_stages_with_dropout_and_with_float32_adapters(monkeypatch):
    """They are of operands that differ from the plain ones, and are checked as these are."""
    shape, dtype = Shape(32, 64, 48, 8, 2, 2), torch.bfloat16
    dropped = {entry["name"]: entry for entry in measured("loramoe", shape, dtype, "dropout")}
    assert set(dropped) == {f"{name}, dropout" for name in ("forward: project", "backward: dX", "backward: dA")}
    wide = measured("loramoe", shape, dtype, "float32 adapter")
    assert len(wide) == 5 and all(entry["name"].endswith(", float32 adapter") for entry in wide)
    assert not measured("loki", Shape(32, 64, 48, 0, 0, 0, rows=5), dtype, "dropout")
    for entry in (*dropped.values(), *wide):
        assert entry["seconds"]["aten"]["median"] > 0 and entry["form"] in entry["name"], entry
    project = hardware.get("project")
    stages = [
        gpu_stages.stages_in(form, project, SMALL, torch.bfloat16, CPU)["forward: project"] for form in gpu_stages.FORMS
    ]
    plain, dropout, float32 = (stage.implementations["aten"](stage.operands, torch.bfloat16)[0] for stage in stages)
    assert stages[2].operands["stack"].dtype == torch.float32 and torch.equal(plain, float32)
    assert not torch.allclose(plain.float(), dropout.float(), rtol=0.1)


def test_a_wrong_mask_gets_no_time(monkeypatch):
    """Another seed drops as many, elsewhere."""
    right = gpu_stages.bottleneck.project

    def wrong(plan, x, m, drop):
        return right(gpu_stages.ATEN, x, m, drop)

    masks = SimpleNamespace(dropout_bits=lambda tokens, width, p, seed, device: seed + 1)
    monkeypatch.setattr(gpu_stages, "implementation", lambda op, impl: masks)
    monkeypatch.setattr(gpu_stages, "obstacle", lambda *_: None)
    monkeypatch.setattr(gpu_stages.bottleneck, "project", wrong)
    (entry, *_) = measured("lora", SMALL, torch.float32, "dropout")
    assert entry["error"].startswith("CorrectnessError: Triton differs from float64")


def test_a_wrong_row_gets_no_time(monkeypatch):
    """Of LoKI's products: one whose rows are not where the library has them, among right ones."""

    def entries() -> list[dict]:
        return measured("loki", Shape(32, 64, 48, 0, 0, 0, rows=5), torch.float32)

    def wrong(name: str, stage: Stage) -> Stage:
        return stage._replace(operands=stage.operands | {"merged": stage.operands["merged"].roll(1, 0)})

    spoil(monkeypatch, lambda name, stage: stage)
    assert [set(entry["seconds"]) for entry in entries()] == [{"aten", "kept", "triton"}] * 2
    spoil(monkeypatch, wrong)
    for entry in entries():
        assert entry["error"].startswith("CorrectnessError: Kept differs from float64 by 1."), entry


def test_a_new_kernel_is_timed_by_its_stages(monkeypatch):
    stage = Stage({"x": torch.randn(4, 4)}, {"aten": lambda t, dtype: (t["x"] + 1,)})
    kernel = hardware.Kernel("new", (), lambda *_: pytest.fail(), stages=lambda *_: {"a stage": stage})
    monkeypatch.setattr(gpu_stages, "KERNELS", {"new": kernel})
    (entry,) = measured("lora", Shape(4, 4, 4, 1, 0, 0), torch.float32)
    assert entry["name"] == "a stage" and entry["errors"]["aten"][0] < 1e-6 and set(entry["seconds"]) == {"aten"}


def layer(method: str, dtype: torch.dtype = torch.float32) -> dict:
    """The entry of a small layer, as the step measures it."""
    case = gpu_cases.make_case(method, 32, 64, 64, dtype)
    return gpu_cases._layer(case, CPU, 2, partial(gpu_cases._planned, device=CPU))


def test_a_wrong_variant_is_left_out_and_the_others_are_timed(monkeypatch):
    def wrong(*operands):
        return gpu_plans.adapter_first(*operands) * 1.01

    monkeypatch.setattr(gpu_plans, "base_first", wrong)
    entry = layer("loramoe")
    assert set(entry["seconds"]) == {"frozen", "eager", "gci auto", "gci library, adapter first"}
    assert entry["left_out"]["gci library, base first"].startswith("CorrectnessError: gci_kernels: y differs")
    triton = {"gci triton", "gci triton expand", "gci triton, library expand"}
    assert set(entry["left_out"]) == {"gci library, base first"} | triton
    assert all("run on GPU tensors" in entry["left_out"][name] for name in triton)


@pytest.mark.parametrize("method", ("lora", "loramoe", "alora"))
def test_a_planned_layer_takes_its_plan(monkeypatch, method):
    """In forward and in backward, and no other layer takes it afterwards."""
    case = gpu_cases.make_case(method, 32, 64, 48, torch.float32)
    inputs, calls = gpu_cases.make_inputs(case, CPU), []
    chosen, own = gpu_plans.plans(case, CPU), gpu_plans.aten.expand
    for name, order in gpu_plans.ORDERS.items():
        plan, _ = chosen[f"library, {name}"]
        counted = gpu_plans.planned_variant(inputs, plan, lambda *t, o=order, n=name: (calls.append(n), o(*t))[1])
        counted.results()
        assert calls == [name] * len(calls) and len(calls) >= 4  # y and dX, of two steps
        calls.clear()
    gpu_cases.gci_variant(inputs, "aten").step()
    assert not calls and gpu_plans.aten.expand is own
    assert chosen["triton expand"][0].expand == "triton" and chosen["triton expand"][0].project == "aten"
    whole, library = chosen["triton"][0], chosen["triton, library expand"][0]
    assert whole.expand == "triton" and library == whole._replace(expand="aten")


def test_layers_come_in_the_order_of_their_worth():
    sizes = gpu_cases.FULL
    names = [name for name, _ in gpu_cases.layers(sizes, CPU)]
    first = [f"T=8192 4096x{width} bfloat16" for width in (4096, 4096, 14336, 14336)]
    assert [name.endswith(shape) for name, shape in zip(names, first, strict=False)] == [True] * 4
    assert [name.split()[0] for name in names[:4]] == ["lora", "loramoe"] * 2 and len(set(names)) == len(names)
    assert [f"{name}, compiled" for name in names[:4]] == names[-4:]
    assert sum("float32 adapter" in name for name in names) == 1


def test_a_wrong_model_is_left_out_and_the_others_are_timed(monkeypatch):
    def fails(*_):
        raise CorrectnessError("wrong")

    monkeypatch.setattr(gpu_cases, "check_model", fails)
    monkeypatch.setattr(gpu_cases, "_check_baseline", fails)
    (entry, _) = (gpu_stages.guarded(*measurement) for measurement in gpu_cases.slices(gpu_cases.QUICK, CPU))
    assert set(entry["seconds"]) == {"frozen", "eager"} == set(entry["peak_memory"])
    assert entry["left_out"] == {"compiled": "CorrectnessError: wrong", "gci": "CorrectnessError: wrong"}


@pytest.fixture
def decodings(monkeypatch) -> Callable[..., dict]:
    """The entry of one case on a CPU, on which ours and the frozen base run in a second way, "graph", given here."""

    def measure(method: str, graph: Callable[[gpu_decode.Decoding], object]) -> dict:
        right = gpu_decode._variants

        def variants(models, ids, *others):
            def make(name: str) -> gpu_decode.Decoding:
                decoding = gpu_decode.Decoding(models[name], ids)
                graph(decoding)
                return decoding

            plain = {name: made for name, made in right(models, ids, *others).items() if "graph" not in name}
            return plain | {f"{name} graph": lambda name=name: make(name) for name in ("frozen", "gci")}

        monkeypatch.setattr(gpu_decode, "_variants", variants)
        return gpu_decode._measure(method, 2, False, gpu_cases.QUICK.decode, CPU)

    return measure


@pytest.mark.parametrize(
    ("length", "wrong"),
    [(12, lambda at: at > gpu_decode.SHORT), (3, lambda at: at <= gpu_decode.SHORT + gpu_decode.CHECKED)],
    ids=["long", "short"],
)
def test_a_graph_that_stays_behind_gets_no_time(decodings, length, wrong):
    """One whose adapters see one token too few, at some lengths alone, is found beside the base that has none."""

    def behind(decoding):
        right = decoding.step

        def step():
            kept = getattr(decoding.cache, "gci_adapters", None)
            if kept is not None and wrong(decoding.at):
                for entry in kept._entries.values():
                    entry.kv[:, decoding.at - 1] = 0
            return right()

        decoding.step = step

    entry = decodings("alora", behind)
    assert entry["left_out"].keys() == {"gci graph"}
    assert f"after {length} tokens it differs" in entry["left_out"]["gci graph"]
    assert set(entry["share"]) == {"eager", "gci"} and "frozen graph" in entry["seconds"]
    console = Console(file=open(os.devnull, "w"), record=True, width=150)
    console.print(gpu_report._decode([entry | {"name": "a case"}]))
    assert "left out" in console.export_text()


def test_wrong_logits_get_no_time(monkeypatch):
    right = gpu_decode.Decoding.logits

    def wrong(decoding, tokens):
        logits = right(decoding, tokens)
        return logits * (1.05 if "Peft" in type(decoding.model).__name__ else 1)

    monkeypatch.setattr(gpu_decode.Decoding, "logits", wrong)
    with pytest.raises(CorrectnessError, match="after 3 tokens logits differ from float64 by 5"):
        gpu_decode._measure("loramoe", 1, False, gpu_cases.QUICK.decode, CPU)


def test_shares_are_of_the_same_way_to_run():
    seconds = {name: gpu_decode.Timing.of([value]) for name, value in (
        ("frozen", 1.0), ("gci", 2.0), ("gci graph", 0.5), ("frozen graph", 0.25), ("eager graph", 1.0), ("gci x", 9.0)
    )}  # fmt: skip
    made = gpu_decode._compare(seconds, 8)
    assert {name: share["median"] for name, share in made["share"].items()} == {
        "gci": 0.5, "gci graph": 0.5, "eager graph": 0.25,
    }  # fmt: skip
    assert made["tokens_per_second"]["gci graph"]["median"] == 16


def test_the_compilers_loss_is_looked_at(monkeypatch):
    losses = iter((1.0, 1.01, 1.0, 1.2, 1.0, float("nan")))
    monkeypatch.setattr(gpu_cases, "training_loss", lambda model, ids: torch.tensor(next(losses)))
    gpu_cases._check_baseline(None, None, None)
    for _ in range(2):
        with pytest.raises(AssertionError, match="the compiled model's loss is"):
            gpu_cases._check_baseline(None, None, None)
