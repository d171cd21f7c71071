"""A kernel's first use in several processes at once: one checks it, the others wait; on an imagined GPU."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from gci_kernels.hardware import locking, proving, records

PROCESSES = 3
RANK = """
import contextlib, os, sys, time
from pathlib import Path

import torch
from gci_kernels import hardware
from gci_kernels.hardware import locking, proving, records, timing

folder, mode = Path(sys.argv[1]), sys.argv[2]
records.gpu = lambda device: ("Imagined 1000", "sm_90")
records.shipped_folder = lambda: folder / "proved"
proving._capturing = lambda: False
torch.cuda.device = lambda device: contextlib.nullcontext()
if mode == "without locks":
    locking.fcntl = None
device = torch.device("cuda", 0)
kernel = {"other kernels": sys.argv[3]}.get(mode, "gate")

def check(kernel, *_):
    (folder / f"checked.{kernel}.{os.getpid()}").touch()
    time.sleep(0.5)
    return True, "", True

proving._self_check = check
timing.measure = lambda *_: {"forward": [(128, 2.0, 1.0)]}
(folder / f"ready.{os.getpid()}").touch()
while len(list(folder.glob("ready.*"))) < 3:
    time.sleep(0.01)
print(hardware.start(kernel, torch.bfloat16, device), hardware.proves(kernel, torch.bfloat16, device))
"""
KERNELS = ("gate", "project", "reduce")


@pytest.mark.parametrize("mode", ("with locks", "without locks", "other kernels"))
def test_processes_that_ask_at_once(tmp_path, monkeypatch, mode):
    """All get the right answer and the file is whole; with locks the work is done once and nothing is lost."""
    monkeypatch.setenv("GCI_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-c", textwrap.dedent(RANK), str(tmp_path), mode]
    started = [
        subprocess.Popen([*command, kernel], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for kernel in KERNELS
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [said.strip() for said, _ in ended] == ["128 True"] * PROCESSES, ended
    checked = [path.name.split(".")[1] for path in tmp_path.glob("checked.*")]
    kept = json.loads((tmp_path / "cache" / "hardware.json").read_text())["proved"]
    of = sorted((record["kernel"], record["variant"]) for record in kept)
    if mode == "other kernels":
        assert sorted(checked) == sorted(KERNELS) and of == [(kernel, "bfloat16") for kernel in sorted(KERNELS)]
    else:
        assert len(checked) == (1 if mode == "with locks" else PROCESSES) and of == [("gate", "bfloat16")]
    if mode == "with locks":
        shown = [errors for _, errors in ended if "gci_kernels checks the GPU kernel gate for bfloat16" in errors]
        assert len(shown) == 1, "one process shows that it works"
    assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.parametrize("why", ("a file in the folder's place", "no locks"))
def test_a_process_that_cannot_lock_goes_on_alone(tmp_path, monkeypatch, why):
    path = tmp_path / "folder" / "lock"
    if why == "no locks":
        monkeypatch.setattr(locking, "fcntl", None)
    else:
        path.parent.write_text("")
    with locking.alone(path):
        pass
    assert not path.exists()


def test_the_lock_is_given_back_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), locking.alone(tmp_path / "lock"):
            raise KeyError
    assert Path(tmp_path / "lock").exists()


def test_a_second_process_takes_the_first_ones_record(imagined_gpu, self_checks, monkeypatch):
    """It had read the records before the other one wrote: behind the lock it reads them again."""
    assert records.own() == ()
    kept = records.make_record("gate", torch.device("cuda", 0), True, variant="bfloat16")

    class Meanwhile:
        def __enter__(self):
            records.own_path().parent.mkdir(parents=True, exist_ok=True)
            records.own_path().write_text(json.dumps({"proved": [kept.as_json()]}))

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(proving, "alone", lambda path: Meanwhile())
    assert proving.proves("gate", torch.bfloat16) and self_checks == []
