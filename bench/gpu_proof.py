"""Which kernels pass the tests marked `gpu`; each kernel's run in a process of their own, for a crash ends all in one.

A Triton kernel is proved by at least one test whose id names it, none of which failed or broke, as long as no test of
the whole op in Triton failed either (its id names "triton", and no kernel). The CUDA C++ kernels are proved by the
tests of their own file, whose names tell ALoRA's from the others'. The tests of layers that decode with them prove no
kernel: what they find may be anything's fault.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from gci_kernels import hardware

ROOT = Path(__file__).resolve().parents[1]
WHOLE, LAYERS = "whole op", "decoding layers"
_DECODE_FILE = "test_gpu_decode"  # part of the name of the next, too
_LAYERS_FILE = "test_gpu_decode_layers"
#: `-k` for pytest, by the group of tests that a process runs.
GROUPS = {kernel: f"{kernel} and not {_DECODE_FILE}" for kernel in hardware.names("triton")}
GROUPS |= {WHOLE: " and not ".join((f"not {_DECODE_FILE}", *hardware.names("triton")))}
_KERNELS = f"{_DECODE_FILE} and not {_LAYERS_FILE}"
GROUPS |= {"decode_step": f"{_KERNELS} and not attend", "decode_attend": f"{_KERNELS} and attend"}
GROUPS |= {LAYERS: _LAYERS_FILE}


@dataclass
class Outcome:
    """What the tests of one group said."""

    passed: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # id -> the first line of what it said
    trouble: str = ""  # why there is no verdict: the process ended before its tests did
    seconds: float = 0.0


def run_tests(groups: list[str], limit_s: float, *, interpreted: bool = False) -> dict[str, Outcome]:
    """Run the groups' tests side by side, and end what is still running after `limit_s` seconds."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if interpreted else {}
    start, processes, outcomes = time.monotonic(), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for group in groups:
            log = Path(folder, group.replace(" ", "_"))
            command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", GROUPS[group], "-p", "no:cacheprovider"]
            with log.open("w") as output:
                processes[group] = log, subprocess.Popen(
                    [*command, f"--junitxml={log}.xml", *files],
                    cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
                )  # fmt: skip
        for group, (log, process) in processes.items():
            try:
                process.wait(max(0.0, start + limit_s - time.monotonic()))
                outcomes[group] = read_junit(Path(f"{log}.xml"), process.returncode, log.read_text(errors="replace"))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                outcomes[group] = Outcome(trouble=f"still running after {limit_s:.0f} s")
            outcomes[group].seconds = round(time.monotonic() - start, 1)
    return outcomes


def read_junit(path: Path, returncode: int, log: str) -> Outcome:
    """What pytest wrote. 0 and 1 are its words for "all passed" and "some failed": else it came to no verdict."""
    if returncode not in (0, 1) or not path.exists():
        last = [line for line in log.strip().splitlines() if line.strip()][-3:]
        return Outcome(trouble=f"pytest ended with status {returncode}: {' | '.join(last)}")
    outcome = Outcome()
    for case in ElementTree.parse(path).iter("testcase"):
        verdicts = {child.tag: child for child in case}
        bad = verdicts.get("failure", verdicts.get("error"))
        if bad is not None:
            outcome.failed[case.get("name")] = (bad.get("message") or bad.text or "").strip().split("\n")[0][:300]
        elif "skipped" in verdicts:
            outcome.skipped += 1
        else:
            outcome.passed += 1
    return outcome


def verdicts(outcomes: dict[str, Outcome], device: torch.device) -> list[hardware.Record]:
    """The records that the outcomes make: none for a kernel whose tests were not run or came to no verdict."""
    records = []
    for kernel in filter(outcomes.__contains__, hardware.KERNELS):
        outcome, other = outcomes[kernel], _relied_on(kernel, outcomes)
        failed = outcome.failed | other.failed
        if failed:
            name, why = next(iter(failed.items()))
            reason = f"{len(failed)} tests, first {name}: {why}"
            records.append(hardware.make_record(kernel, device, False, reason))
        elif outcome.passed and other.passed and not outcome.trouble and not other.trouble:
            records.append(hardware.make_record(kernel, device, True))
    return records


def _relied_on(kernel: str, outcomes: dict[str, Outcome]) -> Outcome:
    """What has to be right beside the kernel's own tests: the whole op in Triton; behind attend, the step's expand."""
    if hardware.get(kernel).language == "cuda":
        return outcomes["decode_step"]
    whole = outcomes[WHOLE]
    return replace(whole, failed={name: why for name, why in whole.failed.items() if re.search(r"\btriton\b", name)})
