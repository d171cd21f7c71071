"""`python -m bench.gpu`: all of it on a CPU, what the GPU tests prove, and what is left when something goes wrong."""

import contextlib
import dataclasses
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
from types import SimpleNamespace

import pytest
import torch
from toy_gpu_run import quick_run

from gci_kernels import hardware, native
from gci_kernels.bench import gpu, gpu_bundle, gpu_cases, gpu_decode, gpu_proof, gpu_run
from gci_kernels.bench.cases import METHODS
from gci_kernels.bench.gpu_proof import WHOLE, Outcome

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
    assert list(result["steps"]) == ["start", "kernels", "build"] and result["errors"] == {} == result["tests"]
    assert result["versions"]["torch"] and not result["stages"]
    assert not list(tmp_path.glob("*.partial"))


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


# What the tests prove


def outcome_of(tmp_path: Path, tests: str) -> Outcome:
    """The outcome of a file of tests, all of one group."""
    made, log = tmp_path / "made", tmp_path / "log.jsonl"
    made.mkdir()
    (made / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--kernel')")
    (made / "test_made.py").write_text(f"import os, pytest\npytestmark = pytest.mark.gpu\n{tests}")
    command = gpu_proof._pytest("gate", log, [str(made / "test_made.py"), "-c", os.devnull, "-p", "no:warnings"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_proof, "_pytest", lambda *_: command)
        return gpu_proof.run_tests(["gate"], 600, log=log)["gate"]


def test_outcomes_are_written_as_the_tests_end(tmp_path):
    outcome = outcome_of(
        tmp_path,
        """
@pytest.fixture
def broken(): raise OSError("first line\\nsecond")
@pytest.mark.parametrize("x", [1])
def test_a(x): pass
def test_b(): pytest.skip("no reason")
def test_c(): assert 1 == 2
def test_d(broken): pass
def test_sanitizer(): assert False
""",
    )
    assert (outcome.passed, outcome.skipped, outcome.trouble) == (1, 1, "")
    assert outcome.failed == {"test_c": "assert 1 == 2", "test_d": "OSError: first line"}
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["test"], line["outcome"]) for line in lines] == [
        ("test_a[1]", "passed"), ("test_b", "skipped"), ("test_c", "failed"), ("test_d", "failed"),
    ]  # fmt: skip


def test_tests_that_end_their_process_prove_nothing(tmp_path):
    outcome = outcome_of(tmp_path, "def test_a(): pass\ndef test_b(): os.kill(os.getpid(), 11)")
    assert outcome.passed == 1 and "status -11" in outcome.trouble and "Segmentation fault" in outcome.trouble


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
    options = ["--device", "cpu", "--out", str(tmp_path), "--records", str(tmp_path / "proved")]
    run = gpu.Run(gpu.parse(options), gpu.SECONDS, ("kernels",))
    run.prove(hardware.make_record("gate", CPU, False, "by its self check"))
    outcomes = {"gate": Outcome(passed=3), "dropout": Outcome(passed=3), WHOLE: Outcome(passed=1)}
    run.prove(*gpu_proof.verdicts(outcomes, CPU))
    monkeypatch.setattr(hardware.records, "shipped_folder", lambda: tmp_path / "proved")
    hardware.records.shipped.cache_clear()
    assert {record.kernel for record in hardware.shipped() if record.passed} == {"gate", "dropout"}
    assert len(hardware.shipped()) == 2 == len(hardware.own())
    hardware.records.shipped.cache_clear()


@pytest.fixture
def a_run(tmp_path, monkeypatch) -> gpu.Run:
    monkeypatch.setenv("GCI_COMMIT", "x")
    return quick_run(tmp_path / "out")


def test_a_second_run_takes_over_what_the_first_has_proved(imagined, tmp_path):
    """Of the same sources, compiler and GPU alone; and the latest of a kernel."""
    gate, dropout, expand = (hardware.make_record(name, CPU, True) for name in ("gate", "dropout", "expand"))
    older = dataclasses.replace(gate, when="2020-01-01T00:00:00Z")
    others = dataclasses.replace(dropout, digest="of other sources"), dataclasses.replace(dropout, gpu="Imagined 2000")
    failed, unknown = dataclasses.replace(expand, passed=False), dataclasses.replace(expand, kernel="unknown")
    first, second, broken = (tmp_path / f"{name}.json" for name in ("first", "second", "broken"))
    first.write_text(json.dumps({"proved": [each.as_json() for each in (gate, *others, failed, unknown)]}))
    second.write_text(json.dumps({"proved": [older.as_json()]}))
    broken.write_text("{")
    records, unread = gpu_proof.read_records([first, second, broken], CPU)
    assert [(record.kernel, record.when) for record in records] == [("gate", gate.when)]
    assert list(unread) == [str(broken)] and unread[str(broken)].startswith("JSONDecodeError")


def test_what_is_proved_is_launched_and_not_checked_again(imagined, monkeypatch, a_run):
    a_run.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    a_run.records_path = a_run.path.with_name("proved.json")
    a_run.prove(hardware.make_record("gate", CPU, True))
    assert gpu._check(a_run, "gate") == [] and gpu._check(a_run, "dropout") == ["--check"]
    measured = gpu_proof.kernel_measurements("gate", CPU, check=False, shapes=(), until=0.0)
    assert [name for name, _ in measured] == ["gate, one launch", "gate, stages compiled"]


def test_stages_are_compiled_while_there_is_time():
    entry = gpu_proof._compile_stages("expand", CPU, gpu_cases.shapes(gpu_cases.QUICK), until=0.0)
    assert entry == {"verdict": "0 stages, then the time was up"}


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


def test_without_a_gpu_it_says_how_to_run_on_a_cpu():
    with pytest.raises(SystemExit, match="--device cpu --quick tests the command"):
        gpu.main([])
