"""What `python -m bench.gpu` times is checked first: what is wrong gets no time, and the rest does."""

import dataclasses
import os
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from gci_kernels import hardware
from gci_kernels.bench import gpu_cases, gpu_decode, gpu_report, gpu_stages
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


def test_a_wrong_kernel_gets_no_time(monkeypatch):
    def change(name: str, stage: Stage) -> Stage:
        right = stage.implementations["aten"]
        if name == "backward: dA":
            return by(stage, lambda t, dtype: tuple(result * 1.001 for result in right(t, dtype)))
        return by(stage, lambda t, dtype: 1 / 0) if name == "dropout" else stage

    spoil(monkeypatch, change)
    entries = list(gpu_stages.stage_entries("lora", Shape(32, 64, 64, 16, 0, 0), torch.float32, CPU, rounds=2))
    entries = {entry["name"]: entry for entry in entries}
    assert "CorrectnessError: Triton differs from float64 by 1.0" in entries["backward: dA"]["error"]
    assert entries["dropout"]["error"].startswith("ZeroDivisionError")
    assert all("seconds" not in entries[name] for name in ("backward: dA", "dropout"))
    assert set(entries["backward: dX"]["seconds"]) == {"aten", "triton"} and len(entries) == 6


def test_a_wrong_row_gets_no_time(monkeypatch):
    """Of LoKI's products: one whose rows are not where the library has them, among right ones."""

    def entries() -> list[dict]:
        shape = Shape(32, 64, 48, 0, 0, 0, rows=5)
        return list(gpu_stages.stage_entries("loki", shape, torch.float32, CPU, rounds=2))

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
    (entry,) = gpu_stages.stage_entries("lora", Shape(4, 4, 4, 1, 0, 0), torch.float32, CPU, rounds=2)
    assert entry["name"] == "a stage" and entry["errors"]["aten"][0] < 1e-6 and set(entry["seconds"]) == {"aten"}


def test_a_wrong_variant_is_left_out_and_the_others_are_timed(monkeypatch):
    right = gpu_cases.gci_variant

    def variant(inputs, impl):
        made = right(inputs, impl)
        factor = {"auto": 1.0, "aten": 1.01}[impl]  # "triton": KeyError
        return gpu_cases.replace(made, forward=lambda: made.forward() * factor)

    monkeypatch.setattr(gpu_cases, "gci_variant", variant)
    monkeypatch.setattr(gpu_cases, "obstacle", lambda *_: None)
    entry = gpu_cases._layer(gpu_cases._case("loramoe", 32, gpu_cases.QUICK, torch.float32), CPU, 2, None)
    assert set(entry["seconds"]) == {"frozen", "eager", "gci auto"}
    assert entry["left_out"]["gci triton"] == "KeyError: 'triton'"
    assert entry["left_out"]["gci aten"].startswith("CorrectnessError: gci_kernels: y differs")


def test_a_wrong_model_is_left_out_and_the_others_are_timed(monkeypatch):
    def fails(*_):
        raise CorrectnessError("wrong")

    monkeypatch.setattr(gpu_cases, "check_model", fails)
    monkeypatch.setattr(gpu_cases, "_check_baseline", fails)
    (entry, _) = gpu_cases.slices(gpu_cases.QUICK, CPU)
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
