"""One command for a machine with a GPU: proves the kernels, times them, and writes bench/results/<gpu>-<commit>.json.

    python -m bench.gpu [--out FOLDER] [--records FOLDER] [--limit-s 540] [--device cuda|cpu] [--quick]

Runs in a checkout with nothing installed and no network; needs torch, triton, transformers, peft, rich and pytest. Each
step is a process of its own with a time limit, so that a crash or a hang ends that step alone; the result is written
after each. The commit comes from git, or from GCI_COMMIT where there is no git. `--device cpu --quick` runs all of it
on a CPU with tiny shapes, to test the command itself.
"""

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console

from gci_kernels import hardware, native
from gci_kernels.proof.verify import obstacle

from . import gpu_cases, gpu_decode, gpu_proof, gpu_report
from .machine import commit, gpu_software, machine, versions, write_json

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
#: The timed steps, each a generator of entries.
STEPS = {
    "stages": gpu_cases.stages, "decode": lambda sizes, device: gpu_decode.decode(sizes.decode, device),
    "layers": gpu_cases.layers, "slices": gpu_cases.slices,
}  # fmt: skip
# Seconds that a step may take at most, within the limit of the whole run.
LIMITS = {"prove": 190, "build": 60, "prove decode": 120, "stages": 90, "decode": 150, "layers": 150, "slices": 540}
# A step stops between two cases when its time is up; its process is ended so many seconds later.
GRACE = 15


class Run:
    """The result, which is written after each step, and the time that is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.deadline = time.monotonic() + args.limit_s
        self.console = Console(stderr=True)
        no_triton = obstacle("triton", args.device, torch.bfloat16)
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            "machine": machine(self.device) | gpu_software(),
            "versions": versions(),
            "commit": commit() or {"sha": os.environ.get("GCI_COMMIT", "unknown"), "changed": None},
            "quick": args.quick,
            "left_out": ({"triton": no_triton} if no_triton else {}) | gpu_decode.reasons(self.device),
            "timing": "medians of interleaved rounds; stages and layers by CUDA events, with an empty L2 and the GPU "
            "busy until all is launched; slices and decode with their launches; all without an optimizer step",
            "proved": [], "tests": {}, **{step: [] for step in STEPS}, "steps": {}, "errors": {},
        }  # fmt: skip
        slug = re.sub(r"[^a-z0-9]+", "-", (self.result["machine"]["gpu"] or "cpu").lower()).strip("-")
        self.path = args.out / f"{slug}-{self.result['commit']['sha'][:10]}.json"
        self.records_path = args.records / f"{slug}.json"

    def step(self, name: str, work: Callable[[float], None]) -> None:
        """Run `work` with the seconds it may take; what it raises becomes part of the result."""
        start, limit = time.monotonic(), min(LIMITS[name], self.deadline - time.monotonic() - GRACE)
        if limit <= 0:
            self.result["errors"][name] = "left out: the time was up"
        else:
            self.console.print(f"{name}: at most {limit:.0f} s")
            try:
                work(limit)
            except Exception as error:  # reported, and the next step runs
                self.result["errors"][name] = f"{type(error).__name__}: {error}"
        self.result["steps"][name] = round(time.monotonic() - start, 1)
        self.write()

    def write(self) -> None:
        """Write the result as it is now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.result)


def start_build(log: TextIO) -> subprocess.Popen[bytes] | None:
    """Start to build csrc/ in place for "prove decode" and the steps after it; None where it is built already."""
    if native.available():
        return None
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def finish_build(process: subprocess.Popen[bytes] | None, log: TextIO, limit: float) -> None:
    """Wait for the build and load what it built; RuntimeError where it failed.

    Raises subprocess.TimeoutExpired where it takes longer than `limit` seconds.
    """
    if process is None:
        return
    try:
        process.wait(timeout=limit)
    finally:
        end(process)  # nothing else may run during timing
    if process.returncode:
        log.seek(0)
        raise RuntimeError(f"csrc was not built: {log.read().strip()[-600:]}")
    importlib.invalidate_caches()
    importlib.reload(native)  # it reads the digest of the CUDA sources when it is imported


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a session of its own, and all that it started, where it is still running."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def prove(run: Run, limit: float) -> None:
    """Run the Triton kernels' tests on the GPU, and make records. On a CPU, interpret the tests of one kernel."""
    on_gpu = run.device.type == "cuda"
    groups = [*hardware.names("triton"), gpu_proof.WHOLE, gpu_proof.LIBRARY] if on_gpu else ["dropout"]
    note(run, gpu_proof.run_tests(groups, limit, interpreted=not on_gpu))


def prove_decode(run: Run, limit: float) -> None:
    """The same for the CUDA C++ kernels, once csrc is built: in a process of their own, which their faults may end."""
    if run.device.type == "cuda":
        note(run, gpu_proof.run_tests([*hardware.names("cuda"), gpu_proof.LAYERS], limit))


def note(run: Run, outcomes: dict[str, gpu_proof.Outcome]) -> None:
    """Add the outcomes and the records that follow from them to the result; RuntimeError where a test failed."""
    if run.device.type == "cuda":
        records = gpu_proof.verdicts(outcomes, torch.device("cuda", torch.cuda.current_device()))
        run.result["proved"] += [record.as_json() for record in records]
        run.records_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(run.records_path, {"proved": run.result["proved"]})
        hardware.keep(*records)  # so that "auto" takes the proved kernels in the steps that follow
    run.result["tests"] |= {group: asdict(outcome) for group, outcome in outcomes.items()}
    wrong = {group: o.trouble or f"{len(o.failed)} tests failed" for group, o in outcomes.items()
             if o.trouble or o.failed}  # fmt: skip
    if wrong:
        raise RuntimeError(f"tests: {wrong}")


def timed(run: Run, name: str, limit: float) -> None:
    """Run one of STEPS in a process of its own; RuntimeError where an entry, a variant or the process failed."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "part.json")
        options = ["--device", run.args.device, *(["--quick"] if run.args.quick else [])]
        command = [sys.executable, "-m", "bench.gpu", *options, "--step", name, "--part", str(part)]
        process = subprocess.Popen(
            [*command, "--limit-s", str(limit)], cwd=ROOT, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            _, said = process.communicate(timeout=limit + GRACE)
            trouble = f"its process ended with status {process.returncode}: {said[-600:]}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            trouble = f"its process was ended, {GRACE} s past its time"
        finally:
            end(process)
        if part.exists():
            run.result[name] = json.loads(part.read_text())
    wrong = [f"{entry['name']}: {entry['error']}" for entry in run.result[name] if "error" in entry]
    wrong += [
        f"{entry['name']}, {variant}: {why}"
        for entry in run.result[name]
        for variant, why in entry.get("left_out", {}).items()
        if why not in run.result["left_out"].values()
    ]
    if trouble or wrong:
        raise RuntimeError("; ".join(([trouble] if trouble else []) + wrong)[:2000])


def run_step(args: argparse.Namespace) -> int:
    """What the process of a timed step does: writes each entry when it is measured, stops when its time is up."""
    if args.device == "cpu":
        torch.set_num_threads(1)  # the tiny shapes gain nothing from more
    deadline = time.monotonic() + args.limit_s
    entries: list[dict] = []
    sizes = gpu_cases.QUICK if args.quick else gpu_cases.FULL
    for entry in STEPS[args.step](sizes, torch.device(args.device)):
        entries.append(entry)
        write_json(args.part, entries)
        if time.monotonic() > deadline:
            raise SystemExit("the time was up before the last case")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    parser.add_argument(
        "--records", type=Path, default=hardware.shipped_folder(), metavar="FOLDER",
        help="where the records of proof go that the package ships (default: where it reads them)",
    )  # fmt: skip
    parser.add_argument("--limit-s", type=float, default=540, help="the whole, in seconds (default: %(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to test the command itself")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run all steps, write the result and print it; 1 where a step failed."""
    args = parse(argv)
    if args.step:
        return run_step(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use; --device cpu --quick tests the command without one")
    run = Run(args)
    with tempfile.TemporaryFile("w+") as log:
        building = start_build(log)
        run.step("prove", lambda limit: prove(run, limit))
        run.step("build", lambda limit: finish_build(building, log, limit))
    run.step("prove decode", lambda limit: prove_decode(run, limit))
    for name in STEPS:
        run.step(name, partial(timed, run, name))
    gpu_report.show(run.result, Console(width=None if Console().is_terminal else 150))
    print(run.path)
    return 1 if run.result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
