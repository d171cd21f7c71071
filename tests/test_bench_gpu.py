"""`python -m bench.gpu`: all of it on a CPU, what the GPU tests prove, and what is left when something goes wrong."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from gci_kernels import hardware, native
from gci_kernels.bench import gpu, gpu_cases, gpu_decode, gpu_proof
from gci_kernels.bench.cases import METHODS
from gci_kernels.bench.gpu_proof import WHOLE, Outcome

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
DTYPES = ("bfloat16", "bfloat16", "float16", "float32")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The files of this checkout and the built extension: no git, nothing installed."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("gci_kernels", "bench", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(native.extension().__file__, folder / "gci_kernels")
    return folder


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_rehearsal(checkout, tmp_path):
    sha = "0123456789abcdef"
    options = ("--device", "cpu", "--quick", "--out", str(tmp_path))
    done = python(checkout, "-m", "bench.gpu", *options, GCI_COMMIT=sha, GCI_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = tmp_path.glob("*.json")
    assert path.name == "cpu-0123456789.json" and done.stdout.strip().endswith(str(path))
    result = json.loads(path.read_text())
    assert result["schema"] == gpu.SCHEMA and result["commit"] == {"sha": sha, "changed": None} and result["quick"]
    assert result["versions"]["torch"] and "driver" in result["machine"] and result["errors"] == {}
    assert list(result["left_out"]) == ["triton", "graph"] and set(result["steps"]) == set(gpu.LIMITS)
    assert result["proved"] == [] and not (tmp_path / "cache").exists()
    assert result["tests"]["dropout"]["passed"] > 5 and not result["tests"]["dropout"]["failed"]

    floors = {"forward: project", "forward: expand", "backward: dU, dB", "backward: dX", "backward: dA"}
    for method, others in (("lora", {"dropout"}), ("loramoe", {"forward: mix", "backward: mix"})):
        assert {entry["name"] for entry in result["stages"] if entry["method"] == method} == floors | others
    assert [entry["name"] for entry in result["stages"] if entry["method"] == "loki"] == ["forward", "backward: dX"]
    for entry in result["stages"]:
        assert set(entry["seconds"]) == ({"aten", "kept"} if entry["method"] == "loki" else {"aten"})
    kinds = [(entry["method"], entry["dtype"]) for entry in result["layers"]]
    others = [(method, "bfloat16") for method in METHODS if method not in gpu_cases.MAIN_METHODS]
    assert kinds == [*zip(("lora", *["loramoe"] * 3), DTYPES, strict=True), *others]
    for entry in result["layers"]:
        compiled = {"compiled"} if entry["dtype"] == "bfloat16" else set()
        assert set(entry["seconds"]) == {"frozen", "eager", "gci auto", "gci aten"} | compiled
        assert set(entry["left_out"]) == {"gci triton"} and set(entry["errors"]) == set(entry["tax"]) - {"eager"}
    for entry in result["slices"]:
        assert set(entry["seconds"]) == {"frozen", "eager", "compiled", "gci"} == set(entry["tokens_per_second"])
    check_rehearsed_decoding(result["decode"])
    tables = ("what they prove", "Stages, ms", "One adapted layer", "Train steps", "Decoding of Llama layers")
    for words in (*tables, "adapter tax", "kernels a step", "adapted layers: decode", sha[:10]):
        assert words in done.stdout, words


def check_rehearsed_decoding(entries: list[dict]) -> None:
    plain, compiled = {"frozen", "eager", "gci"}, {"frozen compiled", "gci compiled"}
    cases = [(entry["method"], entry["batch"]) for entry in entries]
    assert cases == [*((method, batch) for method in gpu_decode.REQUIRED for batch in gpu_decode.BATCHES), ("alora", 1)]
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
    ask = "from bench import gpu_proof as p; print(p.run_tests(['dropout'], 300, interpreted=True))"
    source.write_text(
        code.replace("words >= tl.cast(threshold, tl.uint32)", "words >= tl.cast(threshold, tl.uint32) * 2")
    )
    said = python(wrong, "-c", ask).stdout
    assert "test_mask_is_the_definition" in said and "AssertionError" in said and "trouble=''" in said, said


# What the tests prove


def junit(path: Path, *cases: tuple[str, str]) -> Path:
    verdict = {"passed": "", "skipped": "<skipped/>", "failed": "<failure message='assert 1&#10;more'>long</failure>"}
    verdict["broken"] = "<error>first line\nsecond</error>"
    text = "".join(f"<testcase name='{name}'>{verdict[kind]}</testcase>" for name, kind in cases)
    path.write_text(f"<testsuites><testsuite>{text}</testsuite></testsuites>")
    return path


def test_junit_is_read(tmp_path):
    cases = (("a[gate]", "passed"), ("b[gate]", "skipped"), ("c[gate]", "failed"), ("d[gate]", "broken"))
    outcome = gpu_proof.read_junit(junit(tmp_path / "x.xml", *cases), 1, "")
    assert (outcome.passed, outcome.skipped, outcome.trouble) == (1, 1, "")
    assert outcome.failed == {"c[gate]": "assert 1", "d[gate]": "first line"}
    for path, status in ((tmp_path / "none.xml", 1), (tmp_path / "x.xml", -11), (tmp_path / "x.xml", 2)):
        broken = gpu_proof.read_junit(path, status, "one\ntwo\nSegmentation fault\n")
        assert f"status {status}: one | two | Segmentation fault" in broken.trouble and not broken.passed


@pytest.fixture
def imagined(monkeypatch, tmp_path):
    monkeypatch.setenv("GCI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hardware.records, "gpu", lambda device: ("Imagined 1000", "sm_90"))


TRITON = set(hardware.names("triton"))
CUDA = set(hardware.names("cuda"))


def verdicts(**changed: Outcome) -> dict[str, hardware.Record]:
    outcomes = {group: Outcome(passed=3) for group in gpu_proof.groups()} | changed
    return {record.kernel: record for record in gpu_proof.verdicts(outcomes, CPU)}


def test_a_kernel_is_proved_by_its_tests_and_the_whole_op(imagined):
    assert {name for name, record in verdicts().items() if record.passed} == set(hardware.KERNELS)
    assert verdicts()["gate"].digest == hardware.digest("gate") and verdicts()["gate"].gpu == "Imagined 1000"
    found = verdicts(gate=Outcome(passed=9, failed={"t[gate-float16]": "assert x"}))
    assert found["gate"].reason == "1 tests, first t[gate-float16]: assert x"
    assert {name for name, record in found.items() if not record.passed} == {"gate"}
    for none in (Outcome(), Outcome(skipped=4), Outcome(passed=2, trouble="still running")):
        assert set(verdicts(gate=none)) == set(hardware.KERNELS) - {"gate"}
    failed = Outcome(passed=2, failed={"test_op[case-float16]": "x"})
    for group in (gpu_proof.LIBRARY, gpu_proof.LAYERS):
        assert all(record.passed for record in verdicts(**{group: failed}).values())
    assert {name for name, record in verdicts(**{WHOLE: failed}).items() if record.passed} == CUDA
    assert set(verdicts(**{WHOLE: Outcome(trouble="crashed")})) == CUDA


def test_attend_is_proved_by_the_step_too(imagined):
    failed = {"test_step_of_one_group[x]": "assert x"}
    found = verdicts(decode_step=Outcome(passed=9, failed=failed))
    assert {name for name, record in found.items() if record.passed} == TRITON
    assert found["decode_attend"].reason == "1 tests, first test_step_of_one_group[x]: assert x"
    found = verdicts(decode_attend=Outcome(passed=9, failed={"test_attend[x]": "assert x"}))
    assert {name for name, record in found.items() if not record.passed} == {"decode_attend"}
    for none in (Outcome(), Outcome(skipped=4), Outcome(passed=2, trouble="still running")):
        assert set(verdicts(decode_step=none)) == TRITON
        assert set(verdicts(decode_attend=none)) == TRITON | {"decode_step"}


def test_kernels_that_were_not_tested_get_no_record(imagined):
    """The two kinds are tested one after the other, and either makes records of its own."""
    for kernels, others in ((TRITON, {WHOLE}), (CUDA, set())):
        outcomes = {group: Outcome(passed=3) for group in kernels | others}
        assert {record.kernel for record in gpu_proof.verdicts(outcomes, CPU)} == kernels


def test_a_gpu_test_names_its_kernel(request):
    """conftest.py refuses one that does not, so that each is in one group."""
    hooks = next(p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "pytest_collection_modifyitems")
                 and getattr(p, "__file__", None) == str(ROOT / "tests" / "conftest.py"))  # fmt: skip

    def item(name: str, **marks: tuple) -> SimpleNamespace:
        found = {mark: SimpleNamespace(args=args) for mark, args in marks.items()}
        return SimpleNamespace(nodeid=name, get_closest_marker=found.get)

    def collected(chosen: str | None, *items: SimpleNamespace) -> list[str]:
        hook = SimpleNamespace(pytest_deselected=lambda items: None)
        config, kept = SimpleNamespace(getoption=lambda name: chosen, hook=hook), list(items)
        hooks.pytest_collection_modifyitems(config, kept)
        return [each.nodeid for each in kept]

    tests = item("cpu"), item("gate", gpu=(), kernel=("gate",)), item("op", gpu=(), kernel=(WHOLE,))
    assert collected(None, *tests) == ["cpu", "gate", "op"] and collected("gate", *tests) == ["gate"]
    with pytest.raises(pytest.UsageError, match="--kernel gates: allowed: .*gate"):
        collected("gates", *tests)
    for marks in ({}, {"kernel": ("gates",)}):
        with pytest.raises(pytest.UsageError, match=r"other: marked kernel\((None|gates)\), allowed: .*gate"):
            collected(None, *tests, item("other", gpu=(), **marks))


def test_records_of_proof_are_written_where_the_package_reads_them(imagined, monkeypatch, tmp_path):
    assert gpu.parse([]).records == hardware.shipped_folder()
    run = gpu.Run(gpu.parse(["--device", "cpu", "--out", str(tmp_path), "--records", str(tmp_path / "proved")]))
    run.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu.note(run, {"gate": Outcome(passed=3), "dropout": Outcome(passed=3), WHOLE: Outcome(passed=1)})
    monkeypatch.setattr(hardware.records, "shipped_folder", lambda: tmp_path / "proved")
    hardware.records.shipped.cache_clear()
    assert {record.kernel for record in hardware.shipped() if record.passed} == {"gate", "dropout"}
    hardware.records.shipped.cache_clear()


@pytest.mark.slow
def test_gpu_tests_are_of_the_kernels_that_they_name():
    files = [str(ROOT / "tests" / f"test_gpu_{name}.py") for name in ("decode", "decode_layers")]

    def collected(group: str) -> list[str]:
        command = ("-m", "pytest", "--collect-only", "-q", "-m", "gpu", "--kernel", group, *files)
        return [line for line in python(ROOT, *command).stdout.splitlines() if "::" in line]

    assert all("attend" in test for test in collected("decode_attend"))
    assert all("attend" not in test and "decode.py" in test for test in collected("decode_step"))
    assert all("decode_layers.py" in test for test in collected(gpu_proof.LAYERS))


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


# What is left when something goes wrong


@pytest.fixture
def a_run(tmp_path, monkeypatch) -> gpu.Run:
    monkeypatch.setenv("GCI_COMMIT", "x")
    return gpu.Run(gpu.parse(["--device", "cpu", "--quick", "--out", str(tmp_path)]))


def read(run: gpu.Run) -> dict:
    return json.loads(run.path.read_text())


def test_a_step_that_fails_is_reported_and_what_was_found_is_kept(a_run):
    def work(limit):
        a_run.result["stages"] = [{"name": "done before"}]
        raise RuntimeError("out of order")

    a_run.step("stages", work)
    a_run.deadline = time.monotonic() - 1
    a_run.step("layers", lambda limit: 1 / 0)
    result = read(a_run)
    assert result["errors"] == {"stages": "RuntimeError: out of order", "layers": "left out: the time was up"}
    assert result["stages"] == [{"name": "done before"}] and set(result["steps"]) == {"stages", "layers"}
    console = Console(file=open(os.devnull, "w"), record=True)
    gpu.gpu_report.show(result, console)
    assert "stages: RuntimeError: out of order" in console.export_text()


def test_a_step_that_hangs_is_ended(a_run, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"its process was ended, 0\.5 s past its time"):
        gpu.timed(a_run, "stages", 0.0)
    assert time.monotonic() - start < 5 and started[0].poll() == -9


def test_entries_that_failed_make_the_step_fail(a_run, monkeypatch):
    entries = [
        {"name": "a", "seconds": {}, "left_out": {"gci triton": next(iter(a_run.result["left_out"].values()))}},
        {"name": "b", "seconds": {}, "left_out": {"compiled": "no compiler"}}, {"name": "c", "error": "broke"},
    ]  # fmt: skip

    class Process:
        pid, returncode = 0, -9

        def __init__(self, command, **_):
            Path(command[command.index("--part") + 1]).write_text(json.dumps(entries))

        def communicate(self, timeout):
            return "", "Killed"

        def poll(self):
            return self.returncode

    monkeypatch.setattr(gpu.subprocess, "Popen", Process)
    why = "^its process ended with status -9: Killed; c: broke; b, compiled: no compiler$"
    with pytest.raises(RuntimeError, match=why):
        gpu.timed(a_run, "layers", 1.0)
    assert a_run.result["layers"] == entries


def test_without_a_gpu_it_says_how_to_run_on_a_cpu():
    with pytest.raises(SystemExit, match="--device cpu --quick tests the command"):
        gpu.main([])
