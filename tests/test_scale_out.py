"""Two processes: DDP and FSDP2 (torch's and accelerate's) train, decode and save what one process does alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

METHODS = ("lora", "loramoe", "alora", "hydralora", "loki")
WRAPS = ("layers", "adapted", "linears", "accelerate")
# Fused products in a run: 3 steps, in both models; 3 of an adapter's layers or, of LoKI, 1 in each of 2 decoder layers.
FUSED = {"lora": 36, "loramoe": 36, "alora": 36, "hydralora": 36, "loki": 12}


def run_two(program: list[str], folder: Path) -> None:
    """`program` with each rank and `folder`, at once; both must end well."""
    ranks = [
        subprocess.Popen(
            [sys.executable, *program, str(rank), str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=500)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the two processes of a case found out, by its name; each case runs once."""
    kept: dict[str, dict] = {}

    def case(name: str) -> dict:
        if name not in kept:
            folder = tmp_path_factory.mktemp(name)
            run_two([str(Path(__file__).with_name("scale_out_worker.py")), name], folder)
            kept[name] = json.loads((folder / "found.json").read_text())
        return kept[name]

    return case


def check_training(run: dict) -> None:
    # The loss is a float32 number; all else is float64.
    assert run["losses"] < 1e-6 and run["gradients"] < 1e-12 and run["logits"] < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_ddp_is_one_process_with_the_whole_batch(method, found):
    run = found("ddp")[method]
    check_training(run)
    assert run["fused"] == FUSED[method]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("method", METHODS)
def test_sharded_training_is_one_process_with_the_whole_batch(method, wrap, found):
    run = found("sharded")[f"{method} {wrap}"]
    check_training(run)
    # A base layer that gathers its own weight is called; only the model of one process fuses it then.
    assert run["fused"] == FUSED[method] // (2 if wrap == "linears" else 1)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("method", METHODS)
def test_sharded_model_generates_and_decodes_as_one_process(method, wrap, found):
    run = found("sharded")[f"{method} {wrap}"]
    whole, sharded = run["tokens"]
    assert whole == sharded and len(whole[0][0]) > 3 and run["decoded"] < 1e-5
    # PEFT's own forward runs where its A and B gather themselves; LoKI and HydraLoRA have no kernel for a step.
    assert (run["steps"] > 0) == (method not in ("loki", "hydralora") and (method, wrap) != ("lora", "linears"))


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("method", METHODS)
def test_adapter_saved_from_shards_is_whole(method, wrap, found):
    assert found("sharded")[f"{method} {wrap}"]["saved"] < 1e-9


@pytest.mark.parametrize("method", ("lora", "loramoe", "loki"))
def test_step_on_what_is_not_gathered_raises(method, found):
    """A kernel that goes by addresses would read nothing there."""
    assert "mixed torch.Tensor and DTensor" in found("sharded")["refused"][method]


def test_example_on_two_processes(tmp_path):
    example = Path(__file__).parents[1] / "examples" / "two_processes.py"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--main_process_port=0"]
    done = subprocess.run(
        [*launch, str(example), "--steps=12", "--length=32", "--out=adapter"],
        capture_output=True, text=True, timeout=500, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(losses) == 12 and losses[-1] < 0.95 * losses[0] and "LoRAMoE 8x4" in done.stdout
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_model.safetensors"}
