"""What is left of a run of `python -m bench.gpu` when something goes wrong: all that was found, and the reason."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from toy_gpu_run import quick_run

from gci_kernels.bench import gpu, gpu_log, gpu_processes, gpu_run


@pytest.fixture
def a_run(tmp_path, monkeypatch) -> gpu.Run:
    monkeypatch.setenv("GCI_COMMIT", "x")
    return quick_run(tmp_path / "out")


def read(run: gpu.Run) -> dict:
    return json.loads(run.path.read_text())


def test_a_step_that_fails_is_reported_and_what_was_found_is_kept(a_run):
    def work(limit):
        a_run.add("stages", {"name": "done before"})
        raise RuntimeError("out of order")

    a_run.step("stages", work)
    a_run.began = -1e6
    a_run.step("layers", lambda limit: 1 / 0)
    result = read(a_run)
    assert result["errors"] == {"stages": "RuntimeError: out of order", "layers": "left out: the time was up"}
    assert result["stages"] == [{"name": "done before"}] and set(result["steps"]) == {"stages", "layers"}
    a_run.step("slices", lambda limit: 1 / 0)
    assert "slices" in read(a_run)["left_out"] and "slices" not in read(a_run)["errors"]
    console = Console(file=open(os.devnull, "w"), record=True)
    gpu.gpu_report.show(result, console)
    assert "stages: RuntimeError: out of order" in console.export_text()


def test_the_time_that_a_step_leaves_is_the_next_ones(a_run):
    planned = list(itertools.accumulate(gpu.SECONDS.values()))
    assert planned[-1] == 540 == a_run.args.limit_s and planned[2] == 100
    for since, ends in ((0, planned), (90, [end - 90 for end in planned])):
        a_run.began = time.monotonic() - since
        assert [a_run.limit(name) for name in gpu.SECONDS] == pytest.approx(ends, abs=2)
    a_run.args.limit_s = 5400
    assert a_run.limit("layers") == pytest.approx(2200 - 90, abs=2)


def test_a_second_run_of_a_commit_overwrites_nothing(a_run):
    again = gpu.Run(a_run.args, gpu.SECONDS, ("kernels",))
    stem = a_run.path.stem
    assert a_run.log.path.name == f"{stem}.jsonl" and "-2" not in stem
    assert (again.path.name, again.log.path.name) == (f"{stem}-2.json", f"{stem}-2.jsonl")
    assert read(a_run)["layers"] == [] and "layers" not in read(again)


@pytest.fixture
def told(a_run, monkeypatch) -> Callable[[str], gpu.Run]:
    """The run; the process of a step is told what to do by a few lines of Python, with the number of cases to skip."""
    say = """
import json, os, signal, sys, time
skip, log = int(sys.argv[sys.argv.index("--skip") + 1]), open(sys.argv[1], "a", buffering=1)
def begin(name): print(json.dumps({"step": "stages", "begin": name}), file=log)
def entry(name): begin(name); print(json.dumps({"step": "stages", "entry": {"name": name}}), file=log)
"""

    def tell(lines: str) -> gpu.Run:
        command = [sys.executable, "-c", say + lines, str(a_run.log.path)]
        monkeypatch.setattr(a_run, "child", lambda *options: [*command, *options])
        return a_run

    return tell


def test_a_crash_ends_one_case(told):
    run = told("""
if skip == 0: entry("a"); begin("b"); os.kill(os.getpid(), signal.SIGSEGV)
assert skip == 2; entry("c")""")
    with pytest.raises(RuntimeError, match="^b: its process ended with status -11: $"):
        gpu.timed(run, "stages", 60.0)
    assert [entry["name"] for entry in read(run)["stages"]] == ["a", "b", "c"]


def test_a_lost_gpu_ends_one_case(told):
    """The entry is written before its process gives up."""
    run = told(f"""
if skip == 0: entry("a"); sys.exit({gpu_run.LOST})
assert skip == 1; entry("b"); sys.exit({gpu_run.TIME_UP})""")
    with pytest.raises(RuntimeError, match="^the time was up before the last case$"):
        gpu.timed(run, "stages", 60.0)
    assert read(run)["stages"] == [{"name": "a"}, {"name": "b"}]


def test_a_hang_ends_one_case(told, monkeypatch):
    monkeypatch.setattr(gpu_run, "SILENCE", 5.0)
    run = told("""
if skip == 0: entry("a"); begin("b"); time.sleep(1000)
assert skip == 2; entry("c")""")
    with pytest.raises(RuntimeError, match=r"^b: its process was ended: nothing came from it for 5\.0 s$"):
        gpu.timed(run, "stages", 600.0)
    assert [entry["name"] for entry in read(run)["stages"]] == ["a", "b", "c"]


def test_a_step_that_hangs_is_ended(told, monkeypatch):
    monkeypatch.setattr(gpu_run, "GRACE", 0.5)
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(
        gpu_processes.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"its process was ended, 0\.5 s past its time"):
        gpu.timed(told("time.sleep(1000)"), "stages", 0.0)
    assert time.monotonic() - begun < 60 and [process.poll() for process in started] == [-9]


def test_a_process_that_never_begins_is_not_started_for_ever(told):
    with pytest.raises(RuntimeError, match=r"^its process ended with status 1: .*ImportError: no such thing$"):
        gpu.timed(told("raise ImportError('no such thing')"), "stages", 600.0)


def test_a_kernel_that_fails_leaves_the_others(a_run, monkeypatch):
    """One whose launch raises, one whose process ends in its self check, one that is right."""
    say = """
import json, os, sys
name = sys.argv[sys.argv.index("--kernel") + 1]
def line(**of): print(json.dumps({"step": "kernels", **of}), file=open(sys.argv[1], "a"))
line(begin=f"{name}, one launch")
line(entry={"name": f"{name}, one launch", **({"error": "wrong"} if name == "gate" else {"seconds": 1.0})})
if name == "expand": line(begin="expand, self check"); os.kill(os.getpid(), 11)"""
    monkeypatch.setattr(a_run, "child", lambda *options: [sys.executable, "-c", say, str(a_run.log.path), *options])
    a_run.args.kernel = ["gate", "expand", "dropout", "decode_step"]
    a_run.step("kernels", lambda limit: gpu.kernels(a_run, limit))
    found = {entry["name"]: entry.get("error", "") for entry in read(a_run)["kernels"]}
    ended = "its process ended with status -11: "
    assert found == {
        "gate, one launch": "wrong",
        "expand, one launch": "",
        "expand, self check": ended,
        "dropout, one launch": "",
    }
    assert "'gate, one launch': 'wrong'" in read(a_run)["errors"]["kernels"]
    monkeypatch.setattr(a_run, "child", lambda *options: pytest.fail("tried again"))
    gpu.kernels(a_run, 60.0)


def test_a_build_ends_with_its_run(a_run, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    monkeypatch.setattr(gpu, "start_build", lambda device, log: process)
    with pytest.raises(subprocess.TimeoutExpired), gpu.building(a_run) as finish:
        finish(0.1)
    assert process.poll() == -9
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    with pytest.raises(SystemExit), gpu.building(a_run):
        sys.exit(143)
    assert process.poll() == -9


def test_what_is_missing_is_built(a_run, monkeypatch):
    """An extension that does not load, and on a GPU one without CUDA; what then loads is in the result."""
    started = []
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, **how: started.append((command[1:3], how["cwd"])))
    for available, digest, device, built in (
        (True, "of csrc", "cuda", False), (True, "", "cuda", True), (True, "", "cpu", False), (False, "", "cpu", True),
    ):  # fmt: skip
        monkeypatch.setattr(gpu.native, "available", lambda value=available: value)
        monkeypatch.setattr(gpu.native, "CUDA_DIGEST", digest)
        gpu.start_build(torch.device(device), None)
        assert len(started) == built and started in ([], [(["setup.py", "-q"], gpu.ROOT)])
        started.clear()
    monkeypatch.setattr(gpu, "start_build", lambda device, log: None)
    monkeypatch.setattr(gpu.native, "CUDA_BUILD", "sm_90a, by nvcc 13.0")
    with gpu.building(a_run) as finish:
        finish(1.0)
    assert a_run.result["extension"]["cuda"] == "sm_90a, by nvcc 13.0"


def test_entries_that_failed_make_the_step_fail(a_run):
    known = next(iter(a_run.result["left_out"].values()))
    entries = [
        {"name": "a", "seconds": {}, "left_out": {"gci triton": known}},
        {"name": "b", "seconds": {}, "left_out": {"compiled": "no compiler"}}, {"name": "c", "error": "broke"},
    ]  # fmt: skip
    assert gpu_run.wrong_entries(entries, a_run.result["left_out"]) == ["c: broke", "b, compiled: no compiler"]
    assert gpu_run.wrong_entries(entries[:1], a_run.result["left_out"]) == []


def test_processes_run_side_by_side_and_are_ended_together():
    python, until = [sys.executable, "-c"], time.monotonic() + 10
    commands = {"bad": [*python, "import sys; print('of course'); sys.exit(3)"], "good": [*python, ""],
                "hangs": [*python, "import time; time.sleep(1000)"], "late": [*python, ""]}  # fmt: skip
    commands = {name: commands[name] for name in ("hangs", "bad", "good", "late")}
    listened = []
    ended = gpu_processes.run_all(
        commands, at_once=2, listen=lambda: listened.append(1),
        stop=lambda: "it is late" if len(listened) > 3 and time.monotonic() > until else "",
    )  # fmt: skip
    assert {name: how.status for name, how in ended.items()} == {"hangs": None, "bad": 3, "good": 0, "late": 0}
    assert (
        ended["bad"].trouble == "its process ended with status 3: of course" and ended["hangs"].trouble == "it is late"
    )
    ended = gpu_processes.run_all(commands, at_once=1, stop=lambda: "no time")
    assert ended["late"].trouble == "not started: no time" and ended["hangs"].trouble == "no time"


def test_processes_end_with_the_run(monkeypatch):
    """Which a signal ends, as `timeout` sends it."""
    started, popen = [], subprocess.Popen
    start = lambda *a, **k: started.append(popen(*a, **k)) or started[-1]  # noqa: E731
    monkeypatch.setattr(gpu_processes.subprocess, "Popen", start)
    with pytest.raises(SystemExit):
        gpu_processes.run_all(
            {"hangs": [sys.executable, "-c", "import time; time.sleep(1000)"]}, at_once=1, stop=lambda: sys.exit(143)
        )
    assert [process.poll() for process in started] == [-9]


def test_the_log_is_read_as_it_comes(tmp_path):
    log = gpu_log.Log(tmp_path / "log.jsonl")
    assert log.new() == []
    gpu_log.Log(log.path).write(step="a", entry={"name": "b"})
    with log.path.open("a") as file:
        file.write('broken\n{"step": "half')
    (line, broken) = log.new()
    assert line["entry"] == {"name": "b"} and line["at"] > 1e9 and broken == {"damaged": "broken"}
    with log.path.open("a") as file:
        file.write(' a line"}\n')
    assert log.new() == [{"step": "half a line"}] and log.new() == []
    assert gpu_log.Log(log.path, from_end=True).new() == []


def test_a_damaged_line_of_the_log_is_reported(a_run):
    with a_run.log.path.open("a") as file:
        file.write("damaged\n")
    a_run.listen()
    assert read(a_run)["errors"] == {"log": "a line is damaged: damaged"}
