"""Which kernels are proved: by a self check each, and by the tests marked `gpu`, each group of them in a process.

A test says by its mark `kernel` which group it belongs to: a kernel of the registry, or one of the groups below. A
kernel is proved by at least one test of its own, none of which failed or broke, as long as none failed of what it
relies on: of Triton the tests of the whole op in Triton, and of a kernel that needs others (Kernel.needs) theirs. The
tests of the library's form on the GPU, and of layers that decode with the kernels, prove no kernel: what they find may
be anything's fault.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from gci_kernels import hardware
from gci_kernels.hardware import Shape, self_check

from .gpu_log import Line, Log
from .gpu_processes import ROOT, Ended, run_all
from .gpu_stages import FORMS, Entry, Measurement, stages_in

#: The groups of tests that are about no kernel alone.
WHOLE, LIBRARY, LAYERS = "whole op", "library", "decoding layers"
# Minutes for all of its tests: `--profile` runs the tool on one launch of each kernel.
_LEFT_OUT = "not sanitizer"


def groups() -> tuple[str, ...]:
    """The arguments that the mark `kernel` takes."""
    return (*hardware.KERNELS, WHOLE, LIBRARY, LAYERS)


# One kernel in a process of its own


def launch(name: str, device: torch.device) -> None:
    """Launch one kernel once: its first stage, or all of its check's launches where it has no stage.

    On a CPU, where kernels are interpreted, in float16.
    """
    kernel, dtype = hardware.get(name), _dtype(device)
    shapes = self_check.ODD, Shape(130, 67, 45, 0, 0, 0, rows=9), Shape(130, 67, 45, 16, 0, 0)
    stages = [stage for shape in shapes for stage in kernel.stages(shape, dtype, device).values()]
    if stages:
        stages[0].implementations["triton"](stages[0].operands, dtype)
    else:
        kernel.check(self_check.ODD, dtype, device).kernel()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernel_measurements(
    name: str, device: torch.device, *, check: bool, shapes: Iterable[Shape], until: float
) -> Iterator[Measurement]:
    """One launch of a kernel; with `check` its self check, whose entry has the record that follows; and its stages.

    The stages run once in every layer of `shapes`: what that compiles, the steps that time them find in Triton's cache.
    None begins after `until`, as time.monotonic() counts.
    """

    def timed(work: Callable[[], Entry | None]) -> Entry:
        begun = time.monotonic()
        found = work() or {}
        return {"seconds": round(time.monotonic() - begun, 1), **found}

    yield f"{name}, one launch", partial(timed, partial(launch, name, device))
    if check:
        yield f"{name}, self check", partial(timed, partial(_self_check, name, device))
    if hardware.get(name).language == "triton":
        yield f"{name}, stages compiled", partial(timed, partial(_compile_stages, name, device, shapes, until))


def _compile_stages(name: str, device: torch.device, shapes: Iterable[Shape], until: float) -> Entry:
    """Run the stages; how many."""
    done, dtype = 0, _dtype(device)
    for form, shape in itertools.product(FORMS, shapes):
        for stage in stages_in(form, hardware.get(name), shape, dtype, device).values():
            if time.monotonic() > until:
                return {"verdict": f"{done} stages, then the time was up"}
            stage.implementations["triton"](stage.operands, dtype)
            done += 1
    return {"verdict": f"{done} stages"}


def _dtype(device: torch.device) -> torch.dtype:
    """Of activations: what is timed, or on a CPU what can be interpreted."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def _self_check(name: str, device: torch.device) -> Entry:
    """The record, as JSON holds it, and what it says; no record on a CPU, where one small shape is interpreted.

    Raises:
        AssertionError: it failed on a CPU.
        RuntimeError: the check could not be made, as for want of memory.
    """
    if device.type == "cuda":
        answer = hardware.renew(name, device)
        kept = hardware.find(name, device)
        if kept is None:
            raise RuntimeError(answer.reason)
        return {"record": kept.as_json(), "verdict": "proved" if kept.passed else kept.reason}
    checks = self_check.check_kernel(name, device, dtypes=(_dtype(device),), shapes=(self_check.ODD,))
    failed = [str(check) for check in checks if not check.passed]
    if failed:
        raise AssertionError(f"{len(failed)} checks, first {failed[0]}")
    return {"verdict": "passed"}


def read_records(paths: Iterable[Path], device: torch.device) -> tuple[list[hardware.Record], dict[str, str]]:
    """The records of earlier results that count here, each variant's latest that passed; and what could not be read."""
    found, unread = dict[tuple[str, str], hardware.Record](), dict[str, str]()
    for path in paths:
        try:
            entries = [hardware.Record(**entry) for entry in json.loads(path.read_text()).get("proved", ())]
        except (OSError, ValueError, TypeError, AttributeError) as error:
            unread[str(path)] = f"{type(error).__name__}: {error}"
            continue
        for record in entries:
            if record.passed and _counts(record, device):
                key = record.kernel, record.variant
                found[key] = max(record, found.get(key, record), key=lambda each: each.when)
    return list(found.values()), unread


def _counts(record: hardware.Record, device: torch.device) -> bool:
    """Whether it says something of a kernel as it is here."""
    if record.kernel not in hardware.KERNELS or hardware.missing(record.kernel):
        return False
    here = hardware.make_record(record.kernel, device, True)
    return all(getattr(record, name) == getattr(here, name) for name in ("gpu", "capability", "compiler", "digest"))


# The marked tests


@dataclass
class Outcome:
    """The results of the tests of one group."""

    passed: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # id -> the first line of its message
    trouble: str = ""  # why there is no verdict: the process ended before its tests did
    seconds: float = 0.0

    def add(self, line: Line) -> None:
        """Count the test of one line of the log."""
        if line["outcome"] == "failed":
            self.failed[line["test"]] = line["why"]
        elif line["outcome"] == "skipped":
            self.skipped += 1
        else:
            self.passed += 1


def run_tests(
    names: list[str], limit_s: float, *, log: Path, interpreted: bool = False,
    note: Callable[[dict[str, Outcome]], None] = lambda outcomes: None,
) -> dict[str, Outcome]:  # fmt: skip
    """Run the tests of some groups side by side, and end what is still running after `limit_s` seconds.

    Args:
        log: where each test's outcome is written as the test ends.
        interpreted: whether the kernels are interpreted on a CPU.
        note: called with all outcomes so far whenever there are new ones.
    """
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if interpreted else {}
    outcomes = {name: Outcome() for name in names}
    reader, until = Log(log, from_end=True), time.monotonic() + limit_s

    def listen() -> None:
        lines = [line for line in reader.new() if line.get("step") == "tests"]
        for line in lines:
            outcomes[line["group"]].add(line)
        if lines:
            note(outcomes)

    ended = run_all(
        {name: _pytest(name, log, files) for name in names}, at_once=len(names), listen=listen,
        environments=dict.fromkeys(names, environment), good=(0, 1),
        stop=lambda: f"still running after {limit_s:.0f} s" if time.monotonic() > until else "",
    )  # fmt: skip
    for name, how in ended.items():
        outcomes[name].trouble, outcomes[name].seconds = _trouble(how, outcomes[name]), how.seconds
    note(outcomes)
    return outcomes


def _pytest(group: str, log: Path, files: list[str]) -> list[str]:
    options = ["-q", "-m", "gpu", "-k", _LEFT_OUT, "--kernel", group, "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *options, "-p", "bench.gpu_pytest", "--line-log", str(log), *files]


def _trouble(how: Ended, outcome: Outcome) -> str:
    """Why there is no verdict. pytest's exit statuses 0 and 1 mean that all tests ran, and 1 that some failed."""
    if how.status == 1 and not outcome.failed:
        return "pytest ended with status 1, and no failure was written to the log"
    return how.trouble


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
