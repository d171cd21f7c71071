"""Records of what works on which GPU, the self check, and the plans that "auto" makes of them; on an imagined GPU."""

import argparse
import ast
import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gci_kernels import cli, hardware, native
from gci_kernels.accuracy import Check
from gci_kernels.hardware import kernels, records, self_check
from gci_kernels.ops.bottleneck import choose_plan
from gci_kernels.ops.bottleneck.plan import Plan, prefers_triton
from gci_kernels.proof import info, verify

GPU = torch.device("cuda", 0)
ALL = frozenset(hardware.KERNELS)


@pytest.fixture(autouse=True)
def imagined(monkeypatch, tmp_path):
    """A GPU that nothing can run on, an empty cache folder, no shipped records, and a fresh process's memory."""
    monkeypatch.setenv("GCI_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GCI_SELF_CHECK", raising=False)
    monkeypatch.setattr(records, "gpu", lambda device: ("Imagined 1000", "sm_90"))
    monkeypatch.setattr(records, "_current_index", lambda: 0)
    monkeypatch.setattr(records, "_capturing", lambda: False)
    monkeypatch.setattr(records, "shipped_folder", lambda: tmp_path / "proved")
    for name, value in (("CUDA_DIGEST", "of csrc"), ("CUDA_COMPILER", "nvcc 13.0"), ("CUDA_BUILD", "all of it")):
        monkeypatch.setattr(native, name, value)
    forget()
    yield
    forget()


def forget() -> None:
    records._answers.clear()
    for cached in (records.shipped, records._own, records.warn_once, records.digest):
        cached.cache_clear()


@pytest.fixture
def checks(monkeypatch) -> list[str]:
    """The kernels whose self check was run; each passes, but those named in `failing`."""
    asked: list[str] = []

    def check(kernel, device):
        asked.append(kernel)
        return (False, "it is wrong", True) if kernel == "expand" else (True, "", True)

    monkeypatch.setattr(records, "_self_check", check)
    return asked


def leave_out_cuda(monkeypatch) -> None:
    """The extension as it is where it was built without nvcc."""
    for name, value in (("CUDA_DIGEST", ""), ("CUDA_COMPILER", ""), ("CUDA_BUILD", "not built: no nvcc [here]")):
        monkeypatch.setattr(native, name, value)
    monkeypatch.setattr(native, "available", lambda: True)
    forget()


def ship(tmp_path: Path, *records: hardware.Record) -> None:
    (tmp_path / "proved").mkdir()
    content = {"schema": 1, "proved": [record.as_json() for record in records]}
    (tmp_path / "proved" / "imagined.json").write_text(json.dumps(content))
    (tmp_path / "proved" / "cpu.json").write_text('{"schema": 1}')


# Records


def test_a_shipped_record_counts_without_a_check(tmp_path, checks):
    made = [hardware.make_record("project", GPU, True), hardware.make_record("expand", GPU, False, "wrong")]
    ship(tmp_path, *made)
    assert [hardware.state(kernel, GPU) for kernel in ("project", "expand", "gate")] == ["proved", "failed", "unproved"]
    assert hardware.proves("project") and not hardware.proves("expand")
    assert checks == [] and not hardware.own_path().exists()
    assert str(hardware.find("expand", GPU)).startswith(f"failed: wrong ({tmp_path / 'proved' / 'imagined.json'}, 20")


CHANGES = [{"gpu": "Other"}, {"capability": "sm_80"}, {"compiler": "triton 1.0"}, {"digest": "0"}]


@pytest.mark.parametrize("kernel", ("project", "decode_step"))
@pytest.mark.parametrize("changed", CHANGES, ids=str)
def test_a_record_of_something_else_does_not_count(tmp_path, changed, kernel):
    record = hardware.make_record(kernel, GPU, True)
    assert record.compiler.split()[0] == ("nvcc" if kernel == "decode_step" else "triton")
    ship(tmp_path, hardware.Record(**vars(record) | changed))
    assert len(hardware.shipped()) == 1 and hardware.state(kernel, GPU) == "unproved"


@pytest.mark.parametrize("name", ("CUDA_DIGEST", "CUDA_COMPILER"))
def test_another_build_of_csrc_is_unproved(monkeypatch, name):
    hardware.keep(*(hardware.make_record(kernel, GPU, True) for kernel in ALL))
    assert {hardware.state(kernel, GPU) for kernel in ALL} == {"proved"}
    monkeypatch.setattr(native, name, "another")
    forget()
    assert {kernel for kernel in ALL if hardware.state(kernel, GPU) == "unproved"} == set(hardware.names("cuda"))


def test_what_was_not_built_is_not_asked(monkeypatch, checks, tmp_path, capsys):
    """Neither run nor kept, whatever is shipped; and everything says why."""
    ship(tmp_path, *(hardware.make_record(kernel, GPU, True) for kernel in hardware.names("cuda")))
    leave_out_cuda(monkeypatch)
    assert not any(hardware.proves(kernel) or hardware.proves(kernel) for kernel in hardware.names("cuda"))
    assert checks == [] and not hardware.own_path().exists()
    for gpus in (0, 1):
        rows = {line.split()[1]: line for line in shown(monkeypatch, gpus).splitlines() if line.startswith("│")}
        assert all("not built: no nvcc [here]" in rows[kernel] for kernel in hardware.names("cuda"))
        assert "no record" in rows["gate"]
    monkeypatch.setattr(verify, "verify", lambda device: iter([[Check("case", "aten", "float32", "y", 0.0, 1.0)]]))
    with pytest.warns(RuntimeWarning, match="the GPU kernel 'expand' failed its check"):
        cli.verify(argparse.Namespace(device="cuda"))
    assert tuple(checks) == hardware.names("triton")
    assert "kernel decode_step: not built: no nvcc [here]" in capsys.readouterr().out
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_unavailable", lambda: "no such file")
    assert hardware.missing("decode_attend") == "not built: no such file" and not hardware.missing("gate")


def test_changed_code_is_unproved(tmp_path, monkeypatch):
    hardware.keep(hardware.make_record("gate", GPU, True))
    assert hardware.state("gate", GPU) == "proved"
    for name in hardware.get("gate").files:
        copy = tmp_path / "package" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((records._PACKAGE / name).read_bytes())
    monkeypatch.setattr(records, "_PACKAGE", tmp_path / "package")
    hardware.digest.cache_clear()
    assert hardware.state("gate", GPU) == "proved"
    copy.write_bytes(copy.read_bytes() + b"# changed\n")
    hardware.digest.cache_clear()
    assert hardware.state("gate", GPU) == "unproved"


@pytest.mark.parametrize("kernel", hardware.KERNELS)
def test_a_kernels_files_are_all_that_it_imports_of_ours(kernel):
    """A file that is left out of the table could change, and the record would still count."""
    package = records._PACKAGE
    # What keeps records and calls kernels has no part in what a kernel computes.
    others = {f"hardware/{name}.py" for name in ("kernels", "records", "self_check")}

    def imported(name: str) -> set[str]:
        found = set()
        for node in ast.walk(ast.parse((package / name).read_text())):
            if isinstance(node, ast.ImportFrom) and re.match(r"gci_kernels\.(ops|hardware)", node.module):
                for module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                    path = module.removeprefix("gci_kernels.").replace(".", "/") + ".py"
                    found |= {path} if (package / path).exists() else set()
        return found - others

    files = set(hardware.get(kernel).files)
    assert all((package / name).exists() for name in files)
    assert set().union(*map(imported, files)) <= files


def test_own_records_come_first_and_are_replaced(tmp_path, checks):
    ship(tmp_path, hardware.make_record("gate", GPU, True))
    hardware.keep(hardware.make_record("gate", GPU, False, "not here"), hardware.make_record("reduce", GPU, True))
    assert not hardware.proves("gate") and hardware.proves("reduce")
    hardware.keep(hardware.make_record("gate", GPU, True))
    assert hardware.proves("gate") and len(hardware.own()) == 2
    assert [path.name for path in hardware.own_path().parent.iterdir()] == ["hardware.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"proved": [{"gpu": 1}]}', '{"proved": 3}', "\xff"])
def test_a_damaged_file_counts_as_empty_and_is_warned_of_once(content, checks):
    hardware.own_path().parent.mkdir(parents=True)
    hardware.own_path().write_bytes(content.encode("latin-1"))
    with pytest.warns(RuntimeWarning, match=r"hardware\.json could not be read and counts as empty") as caught:
        assert hardware.state("gate", GPU) == "unproved"
        assert hardware.proves("gate")
    assert len(caught) == 1
    assert json.loads(hardware.own_path().read_text())["proved"][0]["kernel"] == "gate"


def test_a_folder_that_cannot_be_written_is_warned_of_once(monkeypatch, tmp_path, checks):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GCI_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="could not be written, so kernels are checked again") as caught:
        for _ in range(3):
            assert hardware.proves("gate") and hardware.proves("reduce")
    assert len(caught) == 1 and checks == ["gate", "reduce"]


def test_shipped_records_are_the_packages_own_data():
    """Asked in a process of its own, for here the fixture answers."""
    code = "from gci_kernels import hardware; print(hardware.shipped_folder()); print(hardware.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    folder, module = map(Path, done.stdout.splitlines())
    assert folder == module.parent / "proved"
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '"gci_kernels.hardware" = ["proved/*.json"]' in pyproject


# The registry


@pytest.fixture
def registry(monkeypatch):
    """A copy of it."""
    monkeypatch.setattr(kernels, "KERNELS", dict(kernels.KERNELS))
    monkeypatch.setattr(kernels, "_launches", dict(kernels._launches))


def test_a_kernel_is_registered_once(registry):
    gate = hardware.get("gate")
    with pytest.raises(ValueError, match="named 'gate' is registered already, made of ops/gate/triton.py.*; register"):
        hardware.register(gate)
    with pytest.raises(ValueError, match="launch named 'gate' is registered already, by the GPU kernel 'gate'; give"):
        hardware.register(dataclasses.replace(gate, name="another"))
    assert "another" not in kernels.KERNELS
    launch = dataclasses.replace(gate.launches[0], name="another")
    hardware.register(dataclasses.replace(gate, name="another", launches=(launch,)))
    assert list(kernels.KERNELS)[-1] == "another" and kernels.get_launch("another")[1] is launch


def test_an_unknown_name_is_an_error_that_names_the_known(checks):
    with pytest.raises(ValueError, match=r"no GPU kernel is named 'gates'; there are .*gate.*hardware\.register"):
        hardware.get("gates")
    with pytest.raises(ValueError, match="no launch of a GPU kernel is named 'gates'"):
        kernels.get_launch("gates")
    with pytest.raises(ValueError, match="no GPU kernel is named 'gates'"):
        hardware.proves("gates")
    assert checks == []


# The self check


@pytest.mark.smoke
def test_first_use_checks_once_and_remembers(checks):
    with pytest.warns(RuntimeWarning, match="'expand' failed its check on Imagined 1000 and is left out: it is wrong"):
        assert not hardware.proves("expand")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hardware.proves("project") and hardware.proves("project") and not hardware.proves("expand")
        assert checks == ["expand", "project"]
        forget()  # another process
        assert hardware.proves("project") and not hardware.proves("expand")
    assert checks == ["expand", "project"]
    record = hardware.find("expand", GPU)
    assert record.reason == "it is wrong" and record.source == str(hardware.own_path())


def test_no_check_where_it_is_forbidden_or_would_be_captured(monkeypatch, checks):
    monkeypatch.setenv("GCI_SELF_CHECK", "0")
    assert not hardware.proves("project")
    monkeypatch.delenv("GCI_SELF_CHECK")
    monkeypatch.setattr(records, "_capturing", lambda: True)
    assert not hardware.proves("project")
    assert checks == [] and not hardware.own_path().exists()
    monkeypatch.setattr(records, "_capturing", lambda: False)
    assert hardware.proves("project") and checks == ["project"]


def test_no_gpu_proves_nothing(monkeypatch, checks):
    monkeypatch.setattr(records, "_current_index", lambda: None)
    assert not hardware.proves("project") and checks == []


@pytest.fixture
def runnable(monkeypatch):
    """The real _self_check, its device context left out."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


def found(monkeypatch, *checks, raises: Exception | None = None) -> tuple[bool, str, bool]:
    def check_kernel(kernel, device):
        yield from checks
        if raises is not None:
            raise raises

    monkeypatch.setattr(self_check, "check_kernel", check_kernel)
    return records._self_check("gate", GPU)


def test_what_the_self_check_says(monkeypatch, runnable):
    right, wrong = Check("gate T=1", "triton", "bfloat16", "u", 1e-3, 2e-3), Check("c", "triton", "d", "u", 1.0, 2e-3)
    assert found(monkeypatch, right) == (True, "", True)
    assert found(monkeypatch, right, wrong) == (False, "1 checks, first c d u: error 1.0e+00, allowed 2.0e-03", True)
    nan = Check("c", "triton", "d", "u", float("inf"), 2e-3)
    assert not found(monkeypatch, nan)[0]
    assert found(monkeypatch, right, raises=RuntimeError("no such\nthing")) == (False, "RuntimeError: no such", True)
    passed, reason, lasting = found(monkeypatch, raises=torch.OutOfMemoryError("full"))
    assert not passed and "no memory for the check: full" in reason and not lasting


def test_too_little_memory_is_not_remembered(monkeypatch):
    monkeypatch.setattr(records, "_self_check", lambda *_: (False, "no memory", False))
    with pytest.warns(RuntimeWarning, match="no memory"):
        assert not hardware.proves("gate")
    assert not hardware.own_path().exists() and not hardware.proves("gate")


def test_the_check_runs_outside_everything_of_the_callers(monkeypatch, runnable):
    seen = {}

    def check_kernel(kernel, device):
        seen.update(
            thread=threading.current_thread(), autocast=torch.is_autocast_enabled("cpu"),
            inference=torch.is_inference_mode_enabled(), device=torch.empty(0).device.type, kind=type(torch.empty(0)),
        )  # fmt: skip
        return iter(())

    monkeypatch.setattr(self_check, "check_kernel", check_kernel)
    fake = torch._subclasses.FakeTensorMode()
    with torch.autocast("cpu"), torch.inference_mode(), torch.device("meta"), fake:
        assert records._self_check("gate", GPU)[0]
    assert seen.pop("thread") is not threading.current_thread()
    assert seen == {"autocast": False, "inference": False, "device": "cpu", "kind": torch.Tensor}


def interpreted(code: str) -> str:
    """What `code` prints where the kernels are interpreted: a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_self_check_passes_right_kernels_and_stops_wrong_ones():
    """Interpreted, in float32 and float16: every kernel right, then each with a small fault of its own."""
    shown = interpreted(
        """
        import importlib, torch
        from dataclasses import replace
        from gci_kernels import hardware
        from gci_kernels.hardware import Shape, kernels, self_check
        from gci_kernels.ops.bottleneck import config
        from gci_kernels.ops.bottleneck import triton as stages
        from gci_kernels.ops.gate import triton as gate
        from gci_kernels.ops.row_linear import triton as row_linear

        # dY read once for two products: at this size, only where it is asked for.
        small = config.ProjectReduceConfig(16, 16, 16, 2, 4, 1)
        odd, even = self_check.ODD, Shape(48, 64, 48, 16, 2, 2)

        def failed(kernel, *shapes):
            checks = list(self_check.check_kernel(
                kernel, torch.device("cpu"), dtypes=(torch.float32, torch.float16), shapes=shapes))
            assert len(checks) > 10 * len(shapes), len(checks)
            return sorted({f"{check.tensor}: {check.dtype}" for check in checks if not check.passed})

        reduce, both = kernels.get_launch("project_reduce")
        choose = lambda tokens, *_: small if tokens == 48 else None
        kernels._launches["project_reduce"] = reduce, replace(both, choose=choose)
        for kernel in hardware.names("triton"):
            print("right", kernel, failed(kernel, odd, even))

        def unwritten(right):
            def wrong(*args, **kwargs):
                result = right(*args, **kwargs)
                return torch.where(torch.arange(result.shape[0])[:, None] == 0, torch.empty_like(result), result)
            return wrong

        def scaled(right):
            return lambda *args, **kwargs: tuple(r * 1.01 for r in right(*args, **kwargs))

        def rounded(right):
            return lambda *args, **kwargs: right(*args, **kwargs).half().float()

        def noisy(right):
            state = iter(range(10**6))
            def wrong(*args, **kwargs):
                result = right(*args, **kwargs)
                result[0, 0] *= 1 + (next(state) % 2) * 2**-8
                return result
            return wrong

        def shifted(right):
            return lambda positions, rows: right(positions, rows).roll(1)

        def by_position(right):  # as if the active rows came in the order of W's
            return lambda positions, rows: right(positions.sort().values, rows)

        faults = [
            (stages, "project", rounded), (stages, "expand", unwritten), (stages, "reduce", noisy),
            (stages, "project_reduce", scaled), (stages, "dropout", unwritten), (gate, "forward", scaled),
            (gate, "backward", scaled), (row_linear, "_source", shifted), (row_linear, "_source", by_position),
            (row_linear, "dx", unwritten),
        ]
        owners = {gate: "gate", row_linear: "row_linear"}
        for module, name, fault in faults:
            right = getattr(module, name)
            setattr(module, name, fault(right))
            kernel = owners.get(module, "reduce" if name == "project_reduce" else name)
            print("wrong", name, failed(kernel, even if name == "project_reduce" else odd))
            setattr(module, name, right)
        """
    )
    lines = shown.splitlines()
    assert len(lines) == len(hardware.names("triton")) + 10, shown
    for line in lines:
        verdict, _, names = line.split(maxsplit=2)
        assert (names == "[]") == (verdict == "right"), line
    told = {line.split()[1]: line for line in lines if line.startswith("wrong")}
    assert "'dB, one reading: float16'" in told["project_reduce"] and "'dA: " not in told["project_reduce"]
    assert "twice" in told["reduce"] and "'kept: float32'" in told["dropout"] and "'gates: float32'" in told["forward"]
    assert "'du: float16'" in told["project"], "a sum rounded to 16 bits is not what other stages are told it is"


def test_poison_is_there_meanwhile_and_gone_after():
    torch.use_deterministic_algorithms(False)
    with self_check.poisoned():
        assert torch.empty(3).isnan().all() and torch.empty(3, dtype=torch.int32).eq(2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


# info and verify


def shown(monkeypatch, gpus: int) -> str:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imagined 1000")
    console = Console(width=200, file=io.StringIO())
    info.show(console)
    return console.file.getvalue()


@pytest.mark.smoke
def test_info_without_a_gpu_says_what_is_shipped(monkeypatch, tmp_path, checks):
    assert "no GPU here, and no record: these kernels have never run on real hardware" in shown(monkeypatch, 0)
    forget()
    old = hardware.Record(**vars(hardware.make_record("gate", GPU, True)) | {"digest": "0"})
    ship(tmp_path, hardware.make_record("project", GPU, True), hardware.make_record("reduce", GPU, False, "[1]"), old)
    rows = {line.split()[1]: line for line in shown(monkeypatch, 0).splitlines() if line.startswith("│")}
    assert "proved" in rows["project"] and "failed: [1]" in rows["reduce"]
    assert "no record" in rows["gate"] and "no record" in rows["expand"]
    assert checks == []


def test_info_shows_the_state_of_each_gpu_and_checks_nothing(monkeypatch, checks):
    hardware.keep(hardware.make_record("project", GPU, True), hardware.make_record("expand", GPU, False, "wrong"))
    text = shown(monkeypatch, 2)
    assert text.count("Imagined 1000") == 3  # the GPUs, and one column for both
    assert "failed: wrong" in text and "hardware.json" in text
    assert "project=triton mix=aten expand=aten reduce=aten dropout=aten" in text and checks == []


@pytest.mark.parametrize("fails", ("nothing", "aten", "triton"))
def test_verify_renews_every_record(monkeypatch, capsys, checks, fails):
    monkeypatch.setattr(records, "_self_check", lambda kernel, device: (checks.append(kernel) or True, "", True))
    made = [[Check("case", impl, "bfloat16", "dx", 2.0 if impl == fails else 0.0, 1.0)] for impl in ("aten", "triton")]
    monkeypatch.setattr(verify, "verify", lambda device: iter(made))
    hardware.keep(hardware.make_record("gate", GPU, False, "an earlier failure"))
    status = cli.verify(argparse.Namespace(device="cuda"))
    assert status == (0 if fails == "nothing" else 1) and sorted(checks) == sorted(ALL)
    whole = "failed: the whole op failed: case bfloat16: dx"
    wrong = set(hardware.names("triton")) if fails == "triton" else set()  # what is wrong in Triton is not CUDA C++'s
    for kernel in ALL:
        assert str(hardware.find(kernel, GPU)).startswith(whole if kernel in wrong else "proved")
    assert f"kernel gate on Imagined 1000: {whole if fails == 'triton' else 'proved'}" in capsys.readouterr().out


def test_verify_of_the_cpu_keeps_no_record(monkeypatch, checks):
    monkeypatch.setattr(verify, "verify", lambda device: iter([[Check("case", "aten", "float32", "y", 0.0, 1.0)]]))
    assert cli.verify(argparse.Namespace(device="cpu")) == 0 and checks == [] and not hardware.own_path().exists()


# Plans


def plan(
    tokens: int, dtype: torch.dtype, proved: frozenset[str] | None = ALL, impl: str = "auto", mixer="gate"
) -> Plan:
    return choose_plan(impl, tokens=tokens, dtype=dtype, device_type="cuda", mixer=mixer, proved=proved)


def test_auto_takes_what_is_proved_and_expected_to_be_faster():
    assert set(plan(8192, torch.bfloat16)) == {"triton"}
    assert plan(8192, torch.float16) == plan(512, torch.bfloat16) == plan(8192, torch.bfloat16)
    small = plan(511, torch.bfloat16)
    assert small.expand == "aten" and small.project == small.reduce == small.mix == small.dropout == "triton"
    assert plan(8192, torch.float32).expand == "aten" and plan(8192, torch.float32).reduce == "triton"
    for tokens, dtype in ((1, torch.bfloat16), (15, torch.float32), (8192, torch.float64)):
        assert set(plan(tokens, dtype)) == {"aten"}


@pytest.mark.parametrize(
    "kernel", sorted(set(hardware.names("triton")) - {"row_linear"})
)  # test_row_linear.py has its plan
def test_auto_leaves_out_what_is_not_proved(kernel):
    stage, mixer = ("mix", kernel) if kernel in ("gate", "attention") else (kernel, "gate")
    made = plan(8192, torch.bfloat16, ALL - {kernel}, mixer=mixer)._asdict()
    assert {name for name, impl in made.items() if impl == "aten"} == {stage}
    made = plan(8192, torch.bfloat16, frozenset({kernel}), mixer=mixer)._asdict()
    assert {name for name, impl in made.items() if impl == "triton"} == {stage}


@pytest.mark.parametrize("mixer", ("identity", "attention"))
def test_another_mixer_does_not_run_on_the_gates_proof(mixer):
    made = plan(8192, torch.bfloat16, ALL - {"attention"}, mixer=mixer)._asdict()
    assert {name for name, impl in made.items() if impl == "aten"} == {"mix"}


def test_auto_asks_for_no_proof_that_it_would_not_use(checks):
    assert set(plan(1, torch.bfloat16, proved=None)) == {"aten"} and checks == []
    assert plan(64, torch.bfloat16, proved=None).expand == "aten" and "expand" not in checks
    assert not prefers_triton("expand", 10**9, torch.float32)


def test_explicit_impls_need_no_proof(checks):
    assert set(plan(1, torch.bfloat16, frozenset(), "triton")) == {"triton"}
    assert set(plan(8192, torch.bfloat16, ALL, "aten")) == {"aten"}
    with pytest.raises(ValueError, match="impl='native' cannot run here"):
        plan(8192, torch.bfloat16, ALL, "native")
    assert checks == []


def test_the_cpu_is_never_given_triton(checks, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    made = choose_plan("auto", tokens=2048, dtype=torch.float32, device_type="cpu", proved=ALL)
    assert "triton" not in made and checks == []


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_a_compiled_function_asks_while_it_is_traced(checks, backend):
    """The answer, self check included, is a constant of the graph: nothing breaks it and nothing of it is traced."""

    def function(x):
        made = choose_plan("auto", tokens=x.shape[0], dtype=torch.bfloat16, device_type="cuda", mixer="gate")
        return x * (2 if made.project == "triton" else 3) + (10 if made.expand == "triton" else 20), made.key

    torch._dynamo.reset()
    with pytest.warns(RuntimeWarning, match="'expand' failed its check"):
        y, key = torch.compile(function, fullgraph=True, backend=backend)(torch.ones(600))
    assert key == "triton/triton/aten/triton/triton" and torch.equal(y, torch.full((600,), 22.0))
    assert sorted(checks) == ["dropout", "expand", "gate", "project", "reduce"]
    torch._dynamo.reset()
