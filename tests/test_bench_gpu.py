"""`python -m bench.gpu`: all of it on a CPU, what the GPU tests prove, and what is left when something goes wrong."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest
import torch

from gci_kernels import native
from gci_kernels.bench import gpu, gpu_bundle, gpu_cases, gpu_decode, gpu_run
from gci_kernels.bench.cases import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """An unpacked bundle: the files that a run needs and the built extension, without git, and nothing installed."""
    tree, there = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("there")
    for name in ("gci_kernels", "bench", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    subprocess.run(["git", "init", "-q", str(tree)], check=True)
    file = there / "bundle.tar.gz"
    assert gpu_bundle.main(gpu.parse(["--bundle", str(file), "--extension", native.extension().__file__]), tree) == 0
    with tarfile.open(file) as archive:
        archive.extractall(there, filter="data")
    return there / "gci_kernels-unknown"


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def rehearse(out: Path, *options: str) -> list[str]:
    """The arguments of a rehearsal; slow machines have all the time that they need."""
    common = ("--device", "cpu", "--quick", "--out", str(out), "--limit-s", "9000")
    return ["-m", "bench.gpu", *common, "--kernel", "dropout", "gate", "decode_step", *options]


def test_rehearsal(checkout, tmp_path):
    sha = "0123456789abcdef"
    done = python(checkout, *rehearse(tmp_path), GCI_COMMIT=sha, GCI_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = tmp_path.glob("*.json")
    assert path.name == "cpu-0123456789.json" and done.stdout.strip().endswith(str(path))
    result = json.loads(path.read_text())
    assert result["schema"] == gpu_run.SCHEMA and result["commit"] == {"sha": sha, "changed": None} and result["quick"]
    assert result["versions"]["torch"] and "driver" in result["machine"] and result["errors"] == {}
    assert set(result["tools"]) == {"nvcc", "ncu", "compute-sanitizer"} and result["extension"]["loaded"]
    assert list(result["left_out"]) == ["triton", "graph"] and list(result["steps"]) == list(gpu.SECONDS)
    assert all(result["steps"][name] > 0 for name in ("kernels", "layers", "stages", "decode", "tests", "slices"))
    assert result["proved"] == [] and not (tmp_path / "cache").exists()
    assert result["tests"]["dropout"]["passed"] > 5 and not result["tests"]["dropout"]["failed"]
    parts = ("one launch", "self check", "stages compiled")
    names = [f"{kernel}, {what}" for kernel in ("dropout", "gate") for what in parts]
    assert sorted(entry["name"] for entry in result["kernels"]) == names
    stages = {entry["name"]: entry["verdict"] for entry in result["kernels"] if "compiled" in entry["name"]}
    assert stages == {"dropout, stages compiled": "2 stages", "gate, stages compiled": "4 stages"}
    check_rehearsed_stages(result["stages"])
    check_rehearsed_layers(result["layers"])
    for entry in result["slices"]:
        assert set(entry["seconds"]) == {"frozen", "eager", "compiled", "gci"} == set(entry["tokens_per_second"])
    check_rehearsed_decoding(result["decode"])
    tables = ("what is proved", "Stages in bfloat16", "One adapted layer", "Train steps", "Decoding of Llama layers")
    for words in (*tables, "adapter tax", "kernels a step", "adapted layers: decode", sha[:10], "gate, self check"):
        assert words in done.stdout, words
    check_log(path.with_suffix(".jsonl"), result)


def check_log(path: Path, result: dict) -> None:
    """The log has every entry, every test and every step's time, each in a line of its own."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["result"]["versions"] == result["versions"]
    for step in ("kernels", *gpu.STEPS):
        assert [line["entry"] for line in lines if line.get("step") == step and "entry" in line] == result[step]
    assert {line["step"]: line["took"] for line in lines if "took" in line} == result["steps"]
    assert sum(line.get("outcome") == "passed" for line in lines) == result["tests"]["dropout"]["passed"]


def check_rehearsed_stages(entries: list[dict]) -> None:
    entries = [entry | {"name": entry["name"].removeprefix(f"{entry['method']} ")} for entry in entries]
    floors = {"forward: project", "forward: expand", "backward: dU, dB", "backward: dX", "backward: dA"}
    for method, others in (("lora", {"dropout"}), ("loramoe", {"forward: mix", "backward: mix"})):
        names = {entry["name"] for entry in entries if entry["method"] == method}
        dropped = {f"{name}, dropout" for name in ("forward: project", "backward: dX", "backward: dA")}
        assert names == floors | others | dropped | {f"{name}, float32 adapter" for name in floors}
    assert [entry["name"] for entry in entries if entry["method"] == "loki"] == ["forward", "backward: dX"]
    for entry in entries:
        orders = (
            {"adapter first", "base first"}
            if entry["name"].split(", ")[0] in ("forward: expand", "backward: dX")
            else set()
        )
        more = {"kept"} if entry["method"] == "loki" else orders if entry["form"] != "dropout" else set()
        assert set(entry["seconds"]) == {"aten"} | more, entry


def check_rehearsed_layers(entries: list[dict]) -> None:
    kinds = [(entry["method"], entry["features"][1], entry["dtype"]) for entry in entries]
    main = [(method, width, "bfloat16") for width in (64, 96) for method in ("lora", "loramoe")]
    others = [(method, 64, "bfloat16") for method in METHODS if method not in gpu_cases.MAIN_METHODS]
    dtypes = [("loramoe", 64, "float16"), ("loramoe", 64, "float32")]
    fewer = [("lora", 64, "bfloat16"), ("loramoe", 64, "bfloat16")]
    assert kinds == [*main, *others, *fewer, ("lora", 64, "bfloat16"), *dtypes, *main]
    for entry in entries:
        plans = {"gci aten"} if entry["method"] == "loki" else {"gci library, adapter first", "gci library, base first"}
        variants = {"compiled"} if entry["name"].endswith("compiled") else plans
        assert set(entry["seconds"]) == {"frozen", "eager", "gci auto"} | variants, entry
        assert all("triton" in name for name in entry["left_out"])
        assert set(entry["errors"]) == set(entry["tax"]) - {"eager"}
    assert [entry["adapter_dtype"] for entry in entries][8:10] == ["float32", "float16"]


def test_killed_in_the_middle_all_that_was_found_is_there(checkout, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GCI_COMMIT": "f" * 40}
    command = [sys.executable, *rehearse(tmp_path, "--kernel", "dropout")]
    with (tmp_path / "said").open("w") as said:
        run = subprocess.Popen(command, cwd=checkout, env=environment, stdout=said, stderr=said)
    path, result = tmp_path / f"cpu-{'f' * 10}.json", {}
    while len(result.get("layers", ())) < 3:
        assert run.poll() is None, (tmp_path / "said").read_text()[-3000:]
        time.sleep(0.1)
        result = json.loads(path.read_text()) if path.exists() else {}
    run.send_signal(signal.SIGKILL)
    run.wait()
    result = json.loads(path.read_text())
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    logged = [line["entry"] for line in lines if line.get("step") == "layers" and "entry" in line]
    assert len(result["layers"]) >= 3 and logged[: len(result["layers"])] == result["layers"]
    assert [entry["name"] for entry in result["kernels"]] == [
        "dropout, one launch", "dropout, self check", "dropout, stages compiled",
    ]  # fmt: skip
    assert list(result["steps"])[:3] == ["start", "kernels", "build"] and result["errors"] == {}
    assert result["versions"]["torch"] and "slices" not in result["steps"]


def check_rehearsed_decoding(entries: list[dict]) -> None:
    plain, compiled = {"frozen", "eager", "gci"}, {"frozen compiled", "gci compiled"}
    cases = [(entry["method"], entry["batch"]) for entry in entries]
    assert cases == [*((method, batch) for batch in (1, 8, 16) for method in gpu_decode.REQUIRED), ("alora", 1)]
    for entry in entries:
        last = entry is entries[-1]
        timed = compiled if last else plain
        assert set(entry["seconds"]) == timed == set(entry["tokens_per_second"]) and entry["plan"] == "decode"
        assert set(entry["share"]) == {name for name in timed if "frozen" not in name}
        assert entry["left_out"] == ({} if last else {f"{name} graph": gpu_decode.NO_GRAPHS for name in plain})
        assert set(entry["errors"]) == {"3", "12"} and entry["past"] == 12
        assert entry["adapted_layers"] == (8 if entry["method"] == "alora" else 6)


def test_a_fault_in_a_kernel_is_found_by_its_tests(checkout, tmp_path):
    """A mask that drops twice as much."""
    wrong = tmp_path / "wrong"
    shutil.copytree(checkout, wrong)
    source = wrong / "gci_kernels" / "ops" / "bottleneck" / "triton" / "dropout.py"
    code = source.read_text()
    assert code.count("words >= tl.cast(threshold, tl.uint32)") == 1
    ask = "from bench import gpu_proof as p; from pathlib import Path; log = Path('log.jsonl'); "
    ask += "print(p.run_tests(['dropout'], 3000, log=log, interpreted=True))"
    source.write_text(
        code.replace("words >= tl.cast(threshold, tl.uint32)", "words >= tl.cast(threshold, tl.uint32) * 2")
    )
    said = python(wrong, "-c", ask).stdout
    assert "test_mask_is_the_definition" in said and "AssertionError" in said and "trouble=''" in said, said


@pytest.mark.parametrize("program", ("true", "false"))
def test_a_record_names_what_was_built_meanwhile(monkeypatch, program):
    """csrc is built beside the first tests: a process that began without it takes it from then on."""
    monkeypatch.setattr(native, "_extension", None)
    monkeypatch.setattr(native, "CUDA_DIGEST", "of nothing")
    building = subprocess.Popen([program], start_new_session=True)
    built = program == "true"
    with tempfile.TemporaryFile("w+") as log:
        with contextlib.nullcontext() if built else pytest.raises(RuntimeError, match="csrc was not built"):
            gpu.finish_build(building, log, 60)
    assert native.available() == built and (native.CUDA_DIGEST == "of nothing") == (not built)
    assert not built or native.CUDA_DIGEST == native.extension().cuda_digest


def test_without_a_gpu_it_says_how_to_run_on_a_cpu():
    with pytest.raises(SystemExit, match="--device cpu --quick tests the command"):
        gpu.main([])
