"""Which kernels pass the tests marked `gpu`; each group's tests run in a process of their own, for a crash ends all in
one.

A test says by its mark `kernel` which group it belongs to: a kernel of the registry, or one of the groups below. A
kernel is proved by at least one test of its own, none of which failed or broke, as long as none failed of what it
relies on: of Triton the tests of the whole op in Triton, and of a kernel that needs others (Kernel.needs) theirs. The
tests of the library's form on the GPU, and of layers that decode with the kernels, prove no kernel: what they find may
be anything's fault.
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gci_kernels import hardware

ROOT = Path(__file__).resolve().parents[1]
#: The groups of tests that are about no kernel alone.
WHOLE, LIBRARY, LAYERS = "whole op", "library", "decoding layers"


def groups() -> tuple[str, ...]:
    """The arguments that the mark `kernel` takes."""
    return (*hardware.KERNELS, WHOLE, LIBRARY, LAYERS)


@dataclass
class Outcome:
    """The results of the tests of one group."""

    passed: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # id -> the first line of its message
    trouble: str = ""  # why there is no verdict: the process ended before its tests did
    seconds: float = 0.0


def run_tests(names: list[str], limit_s: float, *, interpreted: bool = False) -> dict[str, Outcome]:
    """Run the tests of some groups side by side, and end what is still running after `limit_s` seconds."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if interpreted else {}
    start, processes, outcomes = time.monotonic(), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            log = Path(folder, name.replace(" ", "_"))
            command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--kernel", name, "-p", "no:cacheprovider"]
            with log.open("w") as output:
                processes[name] = log, subprocess.Popen(
                    [*command, f"--junitxml={log}.xml", *files],
                    cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
                )  # fmt: skip
        for name, (log, process) in processes.items():
            try:
                process.wait(max(0.0, start + limit_s - time.monotonic()))
                outcomes[name] = read_junit(Path(f"{log}.xml"), process.returncode, log.read_text(errors="replace"))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                outcomes[name] = Outcome(trouble=f"still running after {limit_s:.0f} s")
            outcomes[name].seconds = round(time.monotonic() - start, 1)
    return outcomes


def read_junit(path: Path, returncode: int, log: str) -> Outcome:
    """The outcome that pytest wrote. Its exit statuses 0 and 1 mean that all tests ran; with others there is none."""
    if returncode not in (0, 1) or not path.exists():
        last = [line for line in log.strip().splitlines() if line.strip()][-3:]
        return Outcome(trouble=f"pytest ended with status {returncode}: {' | '.join(last)}")
    outcome = Outcome()
    for case in ElementTree.parse(path).iter("testcase"):
        results = {child.tag: child for child in case}
        bad = results.get("failure", results.get("error"))
        if bad is not None:
            message = (bad.get("message") or bad.text or "").strip().split("\n")[0]
            outcome.failed[case.get("name") or "?"] = message[:300]
        elif "skipped" in results:
            outcome.skipped += 1
        else:
            outcome.passed += 1
    return outcome


def verdicts(outcomes: dict[str, Outcome], device: torch.device) -> list[hardware.Record]:
    """The records that follow from the outcomes: none for a kernel whose tests were not run or came to no verdict.

    The outcomes of what a tested kernel relies on have to be there.
    """
    records = []
    for kernel in hardware.KERNELS.values():
        if kernel.name not in outcomes:
            continue
        others = (WHOLE, *kernel.needs) if kernel.language == "triton" else kernel.needs
        parts = [outcomes[name] for name in (kernel.name, *others)]
        failed = {test: message for part in parts for test, message in part.failed.items()}
        if failed:
            test, message = next(iter(failed.items()))
            reason = f"{len(failed)} tests, first {test}: {message}"
            records.append(hardware.make_record(kernel.name, device, False, reason))
        elif all(part.passed and not part.trouble for part in parts):
            records.append(hardware.make_record(kernel.name, device, True))
    return records
