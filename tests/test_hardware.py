"""The registry of GPU kernels, records of what works on which GPU, and when a kernel is checked; on an imagined GPU."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from toy_gpu import ALL, GPU, forget, ship

from gci_kernels import hardware, native
from gci_kernels.accuracy import Check
from gci_kernels.hardware import kernels, proving, records, self_check

pytestmark = pytest.mark.usefixtures("imagined_gpu")
HALF = torch.bfloat16


# Records


def test_a_shipped_record_counts_without_a_check(tmp_path, self_checks):
    made = [hardware.make_record("project", GPU, True), hardware.make_record("expand", GPU, False, "wrong")]
    ship(tmp_path, *made)
    assert [hardware.state(kernel, GPU) for kernel in ("project", "expand", "gate")] == ["proved", "failed", "unproved"]
    assert hardware.proves("project", HALF) and not hardware.proves("expand", HALF)
    assert self_checks == [] and not hardware.own_path().exists()
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
            if isinstance(node, ast.ImportFrom) and re.match(r"gci_kernels\.(ops|hardware|limits)", node.module):
                for module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                    path = module.removeprefix("gci_kernels.").replace(".", "/") + ".py"
                    found |= {path} if (package / path).exists() else set()
        return found - others

    files = set(hardware.get(kernel).files)
    assert all((package / name).exists() for name in files)
    assert set().union(*map(imported, files)) <= files


def test_own_records_come_first_and_are_replaced(tmp_path, self_checks):
    ship(tmp_path, hardware.make_record("gate", GPU, True))
    hardware.keep(hardware.make_record("gate", GPU, False, "not here"), hardware.make_record("reduce", GPU, True))
    assert not hardware.proves("gate", HALF) and hardware.proves("reduce", HALF)
    hardware.keep(hardware.make_record("gate", GPU, True))
    assert hardware.proves("gate", HALF) and len(hardware.own()) == 2
    files = sorted(path.name for path in hardware.own_path().parent.iterdir())
    assert files == ["hardware.json", "hardware.lock"]


DAMAGED_TIMES = json.dumps(
    {
        "proved": [
            dict.fromkeys(("gpu", "capability", "compiler", "kernel", "digest", "reason", "when"), "")
            | {"passed": True, "times": {"forward": [1, 2, 3]}}
        ]
    }
)


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"proved": [{"gpu": 1}]}', DAMAGED_TIMES, '{"proved": 3}', "\xff"]
)
def test_a_damaged_file_counts_as_empty_and_is_warned_of_once(content, self_checks):
    hardware.own_path().parent.mkdir(parents=True)
    hardware.own_path().write_bytes(content.encode("latin-1"))
    with pytest.warns(RuntimeWarning, match=r"hardware\.json could not be read and counts as empty") as caught:
        assert hardware.state("gate", GPU) == "unproved"
        assert hardware.proves("gate", HALF)
    assert len(caught) == 1
    assert json.loads(hardware.own_path().read_text())["proved"][0]["kernel"] == "gate"


def test_a_folder_that_cannot_be_written_is_warned_of_once(monkeypatch, tmp_path, self_checks):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GCI_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="could not be written, so kernels are checked again") as caught:
        for _ in range(3):
            assert hardware.proves("gate", HALF) and hardware.proves("reduce", HALF)
    assert len(caught) == 1 and self_checks == ["gate", "reduce"]


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
    monkeypatch.setattr(kernels, "LAUNCHES", dict(kernels.LAUNCHES))


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


def test_an_unknown_name_is_an_error_that_names_the_known(self_checks):
    with pytest.raises(ValueError, match=r"no GPU kernel is named 'gates'; there are .*gate.*hardware\.register"):
        hardware.get("gates")
    with pytest.raises(ValueError, match="no launch of a GPU kernel is named 'gates'"):
        kernels.get_launch("gates")
    with pytest.raises(ValueError, match="no GPU kernel is named 'gates'"):
        hardware.proves("gates", HALF)
    assert self_checks == []


# The self check


@pytest.mark.smoke
def test_first_use_checks_once_and_remembers(self_checks):
    with pytest.warns(RuntimeWarning, match="'expand' failed its check on Imagined 1000 and is left out: it is wrong"):
        assert not hardware.proves("expand", HALF)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            hardware.proves("project", HALF)
            and hardware.proves("project", HALF)
            and not hardware.proves("expand", HALF)
        )
        assert self_checks == ["expand", "project"]
        forget()  # another process
        assert hardware.proves("project", HALF) and not hardware.proves("expand", HALF)
    assert self_checks == ["expand", "project"]
    record = hardware.find("expand", GPU, "bfloat16")
    assert record.reason == "it is wrong" and record.source == str(hardware.own_path())


def test_no_check_where_it_is_forbidden_or_would_be_captured(monkeypatch, self_checks):
    monkeypatch.setenv("GCI_SELF_CHECK", "0")
    assert not hardware.proves("project", HALF)
    monkeypatch.delenv("GCI_SELF_CHECK")
    monkeypatch.setattr(proving, "_capturing", lambda: True)
    assert not hardware.proves("project", HALF)
    assert self_checks == [] and not hardware.own_path().exists()
    monkeypatch.setattr(proving, "_capturing", lambda: False)
    assert hardware.proves("project", HALF) and self_checks == ["project"]


def test_no_gpu_proves_nothing(monkeypatch, self_checks):
    monkeypatch.setattr(proving, "_current_index", lambda: None)
    assert not hardware.proves("project", HALF) and self_checks == []


def found(monkeypatch, *checks, raises: Exception | None = None) -> tuple[bool, str, bool]:
    def check_kernel(kernel, device, **variants):
        yield from checks
        if raises is not None:
            raise raises

    monkeypatch.setattr(self_check, "check_kernel", check_kernel)
    return proving._self_check("gate", GPU, (HALF,), (False,))


def test_what_the_self_check_says(monkeypatch):
    right, wrong = Check("gate T=1", "triton", "bfloat16", "u", 1e-3, 2e-3), Check("c", "triton", "d", "u", 1.0, 2e-3)
    assert found(monkeypatch, right) == (True, "", True)
    assert found(monkeypatch, right, wrong) == (False, "1 checks, first c d u: error 1.0e+00, allowed 2.0e-03", True)
    nan = Check("c", "triton", "d", "u", float("inf"), 2e-3)
    assert not found(monkeypatch, nan)[0]
    assert found(monkeypatch, right, raises=RuntimeError("no such\nthing")) == (False, "RuntimeError: no such", True)
    passed, reason, lasting = found(monkeypatch, raises=torch.OutOfMemoryError("full"))
    assert not passed and "no memory for the check: full" in reason and not lasting


def test_too_little_memory_is_not_remembered(monkeypatch):
    """Neither on the disk nor in the process: the kernel is left out for now, and asked again later."""
    answers = iter([(False, "no memory", False), (True, "", True)])
    monkeypatch.setattr(proving, "_self_check", lambda *_: next(answers))
    with pytest.warns(
        RuntimeWarning, match="'gate' could not be checked on Imagined 1000 and is left out for now: no m"
    ):
        assert not hardware.proves("gate", HALF)
    assert not hardware.own_path().exists()
    assert not hardware.proves("gate", HALF), "not tried at every call"
    later = time.monotonic() + proving.RETRY_AFTER
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert hardware.proves("gate", HALF) and hardware.find("gate", GPU, "bfloat16").passed


def test_the_check_runs_outside_everything_of_the_callers(monkeypatch):
    seen = {}

    def check_kernel(kernel, device, **variants):
        seen.update(
            thread=threading.current_thread(), autocast=torch.is_autocast_enabled("cpu"),
            inference=torch.is_inference_mode_enabled(), device=torch.empty(0).device.type, kind=type(torch.empty(0)),
        )  # fmt: skip
        return iter(())

    monkeypatch.setattr(self_check, "check_kernel", check_kernel)
    fake = torch._subclasses.FakeTensorMode()
    with torch.autocast("cpu"), torch.inference_mode(), torch.device("meta"), fake:
        assert proving._self_check("gate", GPU, (HALF,), (False,))[0]
    assert seen.pop("thread") is not threading.current_thread()
    assert seen == {"autocast": False, "inference": False, "device": "cpu", "kind": torch.Tensor}


# Variants


def test_variants_are_proved_one_by_one(monkeypatch):
    """The dtype of x, with dropout or without where the kernel has two forms; each when it is first asked for."""
    asked = []
    monkeypatch.setattr(proving, "_self_check", lambda *variant: asked.append(variant) or (True, "", True))
    assert hardware.proves("project", HALF) and hardware.proves("project", HALF, dropout=True)
    assert hardware.proves("gate", HALF) and hardware.proves("gate", HALF, dropout=True)  # it has one form
    assert hardware.proves("project", torch.float16)
    assert [(kernel, dtypes, dropouts) for kernel, _, dtypes, dropouts in asked] == [
        ("project", (HALF,), (False,)), ("project", (HALF,), (True,)), ("gate", (HALF,), (False,)),
        ("project", (torch.float16,), (False,)),
    ]  # fmt: skip
    kept = {(record.kernel, record.variant) for record in hardware.own()}
    assert kept == {("project", "bfloat16"), ("project", "bfloat16 with dropout"), ("project", "float16"),
                    ("gate", "bfloat16")}  # fmt: skip


def test_the_record_of_a_whole_kernel_counts_for_its_variants_and_replaces_theirs():
    hardware.keep(hardware.make_record("project", GPU, True, variant="bfloat16"))
    assert hardware.state("project", GPU) == "unproved" and hardware.find("project", GPU, "bfloat16").passed
    hardware.keep(hardware.make_record("project", GPU, False, "wrong"), hardware.make_record("gate", GPU, True))
    assert not hardware.find("project", GPU, "bfloat16").passed and not hardware.proves("project", HALF, dropout=True)
    assert len(hardware.own()) == 2 and hardware.proves("gate", torch.float16)


def test_the_record_of_a_whole_kernel_leaves_times_that_count():
    """Its tests do not time it, and "auto" would have to time it again."""
    times = {"forward": [(128, 2e-3, 1e-3)]}
    hardware.keep(hardware.make_record("project", GPU, True, variant="bfloat16", times=times))
    hardware.keep(hardware.make_record("project", GPU, True))
    assert hardware.recorded("project", HALF, GPU) == 128 and hardware.state("project", GPU) == "proved"
    hardware.keep(hardware.make_record("project", GPU, False, "wrong"))
    assert hardware.recorded("project", HALF, GPU) is None and len(hardware.own()) == 1
