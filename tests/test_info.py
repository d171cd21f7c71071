"""`gci-kernels info`, and what `gci-kernels verify` keeps; on an imagined GPU."""

import argparse

import pytest
import torch
from toy_gpu import ALL, GPU, TIMES, forget, ship, shown

from gci_kernels import cli, hardware, native
from gci_kernels.accuracy import Check
from gci_kernels.hardware import proving
from gci_kernels.proof import verify

pytestmark = pytest.mark.usefixtures("imagined_gpu")


def leave_out_cuda(monkeypatch) -> None:
    """The extension as it is where it was built without nvcc."""
    for name, value in (("CUDA_DIGEST", ""), ("CUDA_COMPILER", ""), ("CUDA_BUILD", "not built: no nvcc [here]")):
        monkeypatch.setattr(native, name, value)
    monkeypatch.setattr(native, "available", lambda: True)
    forget()


def test_what_was_not_built_is_not_asked(monkeypatch, self_checks, tmp_path, capsys):
    """Neither run nor kept, whatever is shipped; and everything says why."""
    ship(tmp_path, *(hardware.make_record(kernel, GPU, True) for kernel in hardware.names("cuda")))
    leave_out_cuda(monkeypatch)
    assert not any(hardware.proves(kernel, torch.bfloat16) for kernel in hardware.names("cuda"))
    assert self_checks == [] and not hardware.own_path().exists()
    for gpus in (0, 1):
        rows = {line.split()[1]: line for line in shown(monkeypatch, gpus).splitlines() if line.startswith("│")}
        assert all("not built: no nvcc [here]" in rows[kernel] for kernel in hardware.names("cuda"))
        assert "no record" in rows["gate"]
    monkeypatch.setattr(verify, "verify", lambda device: iter([[Check("case", "aten", "float32", "y", 0.0, 1.0)]]))
    with pytest.warns(RuntimeWarning, match="the GPU kernel 'expand' failed its check"):
        cli.verify(argparse.Namespace(device="cuda"))
    assert tuple(self_checks) == hardware.names("triton")
    assert "kernel decode_step: not built: no nvcc [here]" in capsys.readouterr().out
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_unavailable", lambda: "no such file")
    assert hardware.missing("decode_attend") == "not built: no such file" and not hardware.missing("gate")


@pytest.mark.smoke
def test_info_without_a_gpu_says_what_is_shipped(monkeypatch, tmp_path, self_checks):
    assert "no GPU here, and no record: these kernels have never run on real hardware" in shown(monkeypatch, 0)
    forget()
    old = hardware.Record(**vars(hardware.make_record("gate", GPU, True)) | {"digest": "0"})
    ship(tmp_path, hardware.make_record("project", GPU, True), hardware.make_record("reduce", GPU, False, "[1]"), old)
    rows = {line.split()[1]: line for line in shown(monkeypatch, 0).splitlines() if line.startswith("│")}
    assert "proved" in rows["project"] and "failed: [1]" in rows["reduce"]
    assert "no record" in rows["gate"] and "no record" in rows["expand"]
    assert self_checks == []


@pytest.mark.parametrize("counted", (0, 1))
def test_info_says_in_a_sentence_why_no_gpu_can_be_used(monkeypatch, counted):
    """No driver: nothing is counted. One that is too old: the GPU is counted, and fails when it is used."""

    def fails(*_):
        raise RuntimeError("The driver is too old (found version 11040).\nPlease update it. See https://example.org")

    monkeypatch.setattr(torch.cuda, "init", fails)
    text = shown(monkeypatch, counted, get_device_name=fails)
    assert "GPUs             none: The driver is too old (found version 11040)\n" in text


def test_a_driver_that_is_too_old_for_the_extension_is_named(monkeypatch, self_checks):
    version = [12080]
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: version[0], raising=False)
    said = "built by nvcc 13.0, which the driver of this machine, for CUDA 12.8, is too old for: install a driver for C"
    assert native.driver_obstacle().startswith(said) and hardware.missing("decode_step").startswith(said)
    assert f"CUDA kernels     {said}" in shown(monkeypatch, 0)
    assert not hardware.proves("decode_step", torch.bfloat16) and self_checks == [] and not hardware.missing("gate")
    assert not hardware.own_path().exists(), "another driver may come"
    for version[0] in (13000, 14020, 0):
        assert native.driver_obstacle() == ""


def test_info_shows_the_state_of_each_gpu_and_checks_nothing(monkeypatch, self_checks):
    hardware.keep(
        hardware.make_record("project", GPU, True, times=TIMES), hardware.make_record("expand", GPU, False, "wrong"),
        hardware.make_record("reduce", GPU, True),
        *(hardware.make_record("gate", GPU, True, variant=each) for each in ("bfloat16", "float16")),
    )  # fmt: skip
    text = shown(monkeypatch, 2)
    assert "proved, used from 1024 tokens" in text and "bfloat16: proved (" in text and "float16: proved (" in text
    assert text.count("Imagined 1000") == 3  # the GPUs, and one column for both
    assert "failed: wrong" in text and "hardware.json" in text
    assert "project=triton mix=aten expand=aten reduce=aten dropout=aten" in text and self_checks == []


@pytest.mark.parametrize("fails", ("nothing", "aten", "triton"))
def test_verify_renews_every_record(monkeypatch, capsys, self_checks, fails):
    monkeypatch.setattr(proving, "_self_check", lambda kernel, *_: (self_checks.append(kernel) or True, "", True))
    made = [[Check("case", impl, "bfloat16", "dx", 2.0 if impl == fails else 0.0, 1.0)] for impl in ("aten", "triton")]
    monkeypatch.setattr(verify, "verify", lambda device: iter(made))
    hardware.keep(hardware.make_record("gate", GPU, False, "an earlier failure"))
    status = cli.verify(argparse.Namespace(device="cuda"))
    assert status == (0 if fails == "nothing" else 1) and sorted(self_checks) == sorted(ALL)
    whole = "failed: the whole op failed: case bfloat16: dx"
    wrong = set(hardware.names("triton")) if fails == "triton" else set()  # what is wrong in Triton is not CUDA C++'s
    for kernel in ALL:
        assert str(hardware.find(kernel, GPU)).startswith(whole if kernel in wrong else "proved")
    assert f"kernel gate on Imagined 1000: {whole if fails == 'triton' else 'proved'}" in capsys.readouterr().out


def test_verify_of_the_cpu_keeps_no_record(monkeypatch, self_checks):
    monkeypatch.setattr(verify, "verify", lambda device: iter([[Check("case", "aten", "float32", "y", 0.0, 1.0)]]))
    assert cli.verify(argparse.Namespace(device="cpu")) == 0 and self_checks == [] and not hardware.own_path().exists()
