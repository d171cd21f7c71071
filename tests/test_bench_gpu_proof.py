"""What `python -m bench.gpu` takes for proved: by self checks, by the GPU tests, and by earlier runs."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy_gpu_run import quick_run

from gci_kernels import hardware
from gci_kernels.bench import gpu, gpu_cases, gpu_proof
from gci_kernels.bench.gpu_proof import WHOLE, Outcome

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


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


@pytest.fixture
def on_a_gpu(imagined, monkeypatch, a_run, tmp_path) -> gpu.Run:
    """The run, as if it were on a GPU; its records go elsewhere."""
    a_run.device, a_run.records_path = torch.device("cuda"), tmp_path / "proved" / "imagined.json"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return a_run


def proved(run: gpu.Run) -> dict[str, bool]:
    """What the result, the file of records and this machine agree on."""
    result, records = json.loads(run.path.read_text()), json.loads(run.records_path.read_text())
    assert records == {"proved": result["proved"]}
    made = {record["kernel"]: record for record in result["proved"]}
    assert {record.kernel: record.as_json() for record in hardware.own()} == made
    return {kernel: record["passed"] for kernel, record in made.items()}


def test_self_checks_make_records(on_a_gpu, monkeypatch):
    """Of the kernels alone that have none yet, as an earlier run has proved them."""
    kept, wrong = hardware.make_record("gate", CPU, True), hardware.make_record("expand", CPU, False, "it is wrong")
    on_a_gpu.args.earlier = on_a_gpu.args.out / "earlier"
    on_a_gpu.args.earlier.mkdir()
    (on_a_gpu.args.earlier / "first.json").write_text(json.dumps({"proved": [kept.as_json()]}))
    on_a_gpu.step("start", lambda limit: gpu.start(on_a_gpu, limit))
    say = f"""
import json, sys
name, made = sys.argv[sys.argv.index("--kernel") + 1], {wrong.as_json()!r}
assert (name == "gate") != ("--check" in sys.argv)
entry = {{"name": f"{{name}}, self check", "seconds": 1.0, **({{"record": made}} if name == "expand" else {{}})}}
print(json.dumps({{"step": "kernels", "entry": entry}}), file=open(sys.argv[1], "a"))"""
    log = str(on_a_gpu.log.path)
    monkeypatch.setattr(on_a_gpu, "child", lambda *options: [sys.executable, "-c", say, log, *options])
    on_a_gpu.args.kernel = ["gate", "expand"]
    on_a_gpu.step("kernels", lambda limit: gpu.kernels(on_a_gpu, limit))
    assert proved(on_a_gpu) == {"gate": True, "expand": False}
    assert json.loads(on_a_gpu.path.read_text())["errors"] == {
        "kernels": "RuntimeError: kernels: {'expand': 'it is wrong'}"
    }


def test_tests_make_records(on_a_gpu, monkeypatch):
    """In place of those of the self checks."""
    on_a_gpu.prove(hardware.make_record("gate", CPU, True), hardware.make_record("expand", CPU, False, "it is wrong"))
    failed = Outcome(passed=3, failed={"test_gate": "assert x"})

    def run_tests(names, limit, *, note, **_):
        outcomes = {name: Outcome(passed=3) for name in names} | {"gate": failed}
        note(outcomes)
        return outcomes

    monkeypatch.setattr(gpu_proof, "run_tests", run_tests)
    on_a_gpu.step("tests", lambda limit: gpu.tests(on_a_gpu, limit))
    assert proved(on_a_gpu) == {name: name != "gate" for name in hardware.KERNELS}
    result = json.loads(on_a_gpu.path.read_text())
    assert set(result["tests"]) == set(gpu_proof.groups()) and result["tests"]["gate"]["failed"] == failed.failed
    assert result["errors"] == {"tests": "RuntimeError: tests: {'gate': '1 tests failed'}"}


def test_times_that_a_step_has_measured_are_shipped(on_a_gpu):
    """By its own process, which keeps them on this machine, as any use of "auto" does; not those of a failed kernel."""
    times = {"forward": [[128, 2e-3, 1e-3]]}
    hardware.keep(*(hardware.make_record(name, CPU, True, "", "bfloat16", times) for name in ("gate", "expand")))
    on_a_gpu.ship_times()
    on_a_gpu.prove(hardware.make_record("gate", CPU, True), hardware.make_record("expand", CPU, False, "it is wrong"))
    shipped = json.loads(on_a_gpu.records_path.read_text())["proved"]
    assert {(each["kernel"], each["variant"]): each["times"] for each in shipped} == {
        ("gate", "bfloat16"): times, ("gate", ""): {}, ("expand", ""): {},
    }  # fmt: skip
    assert on_a_gpu.result["proved"] == shipped


def test_stages_are_compiled_while_there_is_time():
    entry = gpu_proof._compile_stages("expand", CPU, gpu_cases.shapes(gpu_cases.QUICK), until=0.0)
    assert entry == {"verdict": "0 stages, then the time was up"}


@pytest.mark.slow
def test_gpu_tests_are_of_the_kernels_that_they_name():
    files = [str(ROOT / "tests" / f"test_gpu_{name}.py") for name in ("decode", "decode_layers")]

    def collected(group: str) -> list[str]:
        command = ("-m", "pytest", "--collect-only", "-q", "-m", "gpu", "--kernel", group, *files)
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        return [line for line in done.stdout.splitlines() if "::" in line]

    assert all("attend" in test for test in collected("decode_attend"))
    assert all("attend" not in test and "decode.py" in test for test in collected("decode_step"))
    assert all("decode_layers.py" in test for test in collected(gpu_proof.LAYERS))
