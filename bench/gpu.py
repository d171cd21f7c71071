"""One command for a rented GPU: proves the kernels, times them, and writes <gpu>-<commit>.json and a log beside it.

    python -m bench.gpu [--out FOLDER] [--records FOLDER] [--limit-s 540] [--device cuda|cpu] [--quick]
    python -m bench.gpu --profile     counters of the products, and memcheck of every kernel
    python -m bench.gpu --bundle FILE packs all that a machine without a network needs; on any machine

Runs in a checkout with nothing installed and no network; needs torch, triton, transformers, peft, rich and pytest. What
is worth most comes first. Every step, and each kernel, has a process of its own with a time limit, so that a crash or a
hang ends that part alone; the result and the log grow with every entry, so that an end at any moment loses nothing. A
later run takes over what earlier results in `--earlier FOLDER` prove. The commit comes from git, or from
GCI_COMMIT where there is no git. `--device cpu --quick` runs all of it on a CPU with tiny shapes, to test the command
itself.
"""

import argparse
import contextlib
import importlib
import itertools
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console

from gci_kernels import hardware, native

from . import gpu_bundle, gpu_cases, gpu_decode, gpu_profile, gpu_proof, gpu_report
from .gpu_log import Log
from .gpu_processes import ROOT, end, run_all
from .gpu_run import GRACE, LOST, TIME_UP, Run, extension, timed
from .gpu_stages import Measurement, guarded, lost

#: The timed steps, each a generator of measurements.
STEPS: dict[str, Callable[[gpu_cases.Sizes, torch.device], Iterator[Measurement]]] = {
    "layers": gpu_cases.layers, "stages": gpu_cases.stages,
    "decode": lambda sizes, device: gpu_decode.decode(sizes.decode, device), "slices": gpu_cases.slices,
}  # fmt: skip
#: All steps in their order, and the seconds of each in a run of 540; what one leaves is the next one's.
SECONDS = {
    "start": 5, "kernels": 75, "build": 20, "layers": 120, "stages": 70, "decode": 110, "tests": 140, "slices": 0,
}  # fmt: skip
BESIDE = ROOT / "bench" / "results"


def start(run: Run, limit: float) -> None:
    """Say what is here, and take over what earlier runs have proved. The result has the versions already."""
    loaded, tools = run.result["extension"], run.result["tools"]
    run.console.print(gpu_report.where(run.result), markup=False)
    run.console.print(f"extension: {loaded['why'] or 'loaded'}; CUDA kernels: {loaded['cuda']}", markup=False)
    run.console.print(", ".join(f"{name}: {path or 'not here'}" for name, path in tools.items()), markup=False)
    if run.device.type == "cuda":
        paths = sorted({*run.args.earlier.glob("*.json"), *run.args.out.glob("*.json")} - {run.path})
        records, unread = gpu_proof.read_records(paths, _current())
        run.prove(*records)
        run.result["left_out"] |= {f"records in {path}": why for path, why in unread.items()}


def start_build(device: torch.device, log: TextIO) -> subprocess.Popen[bytes] | None:
    """Start to build csrc/ in place, beside the Triton kernels' checks; None where it is built for the device."""
    if native.available() and (native.CUDA_DIGEST or device.type == "cpu"):
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


def kernels(run: Run, limit: float) -> None:
    """Launch and check each kernel in a process of its own, side by side, as compilers take most of the time.

    Those that are missing, or were tried before, are left out.

    Raises:
        RuntimeError: a launch or a check failed.
    """
    until, on_gpu = time.monotonic() + limit, run.device.type == "cuda"
    tried = {_kernel(entry["name"]) for entry in run.result["kernels"]}
    names = [name for name in run.chosen() if name not in tried and not hardware.missing(name)]
    environment = {} if on_gpu else {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    less = "--limit-s", f"{limit - GRACE:.0f}"
    with tempfile.TemporaryDirectory() as folder:
        # Records are kept by this process: each of those has a cache folder of its own.
        ended = run_all(
            {name: run.child("--step", "kernels", "--kernel", name, *_check(run, name), *less) for name in names},
            at_once=run.result["machine"]["cores"], listen=run.listen, good=(0, LOST),
            environments={name: environment | {"GCI_CACHE": str(Path(folder, name))} for name in names},
            stop=lambda: f"still running after {limit:.0f} s" if time.monotonic() > until else "",
        )  # fmt: skip
    for name, how in ended.items():
        if how.trouble:
            begun = [case for case in run.begun["kernels"] if _kernel(case) == name]
            run.add("kernels", {"name": (begun or [f"{name}, one launch"])[-1], "error": how.trouble})
    entries = [entry for entry in run.result["kernels"] if _kernel(entry["name"]) in names]
    wrong = {entry["name"]: entry["error"] for entry in entries if "error" in entry}
    wrong |= {record["kernel"]: record["reason"] for record in run.result["proved"]
              if record["kernel"] in names and not record["passed"]}  # fmt: skip
    if wrong:
        raise RuntimeError(f"kernels: {wrong}")


def _kernel(entry: str) -> str:
    """The kernel that an entry of that name is about."""
    return entry.partition(", ")[0]


def _check(run: Run, name: str) -> list[str]:
    """The option that asks for the self check; none for a kernel that is proved already."""
    proved = run.device.type == "cuda" and hardware.state(name, _current()) == "proved"
    return [] if proved else ["--check"]


def _current() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@contextlib.contextmanager
def building(run: Run) -> Iterator[Callable[[float], None]]:
    """csrc is built meanwhile, where it has to be; gives what waits for that, some seconds, and notes the outcome."""
    with tempfile.TemporaryFile("w+") as log:
        process = start_build(run.device, log)

        def finish(limit: float) -> None:
            try:
                finish_build(process, log, limit)
            finally:
                run.result["extension"] = extension()

        try:
            yield finish
        finally:
            if process is not None:
                end(process)


def build(run: Run, limit: float, finish: Callable[[float], None]) -> None:
    """Wait for what is built beside "kernels", and check the kernels in it.

    Raises:
        RuntimeError: nothing was built, or a kernel is missing, or failed.
    """
    until = time.monotonic() + limit
    finish(limit)
    kernels(run, until - time.monotonic())
    missing = {name: hardware.missing(name) for name in run.chosen() if hardware.missing(name)}
    if missing:
        raise RuntimeError(f"missing: {missing}")


def tests(run: Run, limit: float) -> None:
    """Run the tests marked `gpu`, and make records. On a CPU, interpret the tests of one kernel.

    Raises:
        RuntimeError: a test failed, or a group came to no end.
    """
    on_gpu = run.device.type == "cuda"

    def note(outcomes: dict[str, gpu_proof.Outcome]) -> None:
        run.result["tests"] |= {group: asdict(outcome) for group, outcome in outcomes.items()}
        run.write()

    names = list(gpu_proof.groups()) if on_gpu else ["dropout"]
    outcomes = gpu_proof.run_tests(names, limit, log=run.log.path, interpreted=not on_gpu, note=note)
    if on_gpu:
        run.prove(*gpu_proof.verdicts(outcomes, _current()))
    for group, o in outcomes.items():
        run.console.print(
            f"tests: {group}: {o.passed} passed, {o.skipped} skipped, {len(o.failed)} failed", markup=False
        )
    wrong = {group: o.trouble or f"{len(o.failed)} tests failed" for group, o in outcomes.items()
             if o.trouble or o.failed}  # fmt: skip
    if wrong:
        raise RuntimeError(f"tests: {wrong}")


def run_step(args: argparse.Namespace) -> int:
    """What a step's process does: writes each entry when it is measured, stops when its time is up or its GPU lost."""
    if args.step == "memcheck":
        gpu_proof.launch(args.kernel[0], torch.device(args.device))
        return 0
    if args.step == "counters":
        method, stage = args.product
        gpu_profile.product(method, stage, _sizes(args), torch.device(args.device))
        return 0
    device, log, parent = _current() if args.device == "cuda" else torch.device("cpu"), Log(args.log), os.getppid()
    deadline = time.monotonic() + args.limit_s if args.step in STEPS else math.inf  # a kernel's check is not left out
    if args.device == "cpu":
        torch.set_num_threads(1)  # the tiny shapes gain nothing from more
    for name, measure in itertools.islice(_measurements(args, device), args.skip, None):
        if time.monotonic() > deadline or os.getppid() != parent:  # or the run itself was killed
            return TIME_UP
        log.write(step=args.step, begin=name)
        entry = guarded(name, measure)
        log.write(step=args.step, entry=entry)
        if "error" in entry and device.type == "cuda" and lost():
            return LOST
    return 0


def _measurements(args: argparse.Namespace, device: torch.device) -> Iterator[Measurement]:
    """Those of a timed step; or of one kernel."""
    if args.step == "kernels":
        shapes = gpu_cases.shapes(_sizes(args))
        until = time.monotonic() + args.limit_s
        return gpu_proof.kernel_measurements(args.kernel[0], device, check=args.check, shapes=shapes, until=until)
    return STEPS[args.step](_sizes(args), device)


def _sizes(args: argparse.Namespace) -> gpu_cases.Sizes:
    return gpu_cases.QUICK if args.quick else gpu_cases.FULL


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=BESIDE, metavar="FOLDER")
    parser.add_argument(
        "--earlier", type=Path, default=BESIDE, metavar="FOLDER",
        help="results of earlier runs: what they prove is not proved again (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--records", type=Path, default=hardware.shipped_folder(), metavar="FOLDER",
        help="where the records of proof go that the package ships (default: where it reads them)",
    )  # fmt: skip
    parser.add_argument("--limit-s", type=float, default=540, help="the whole, in seconds (default: %(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to test the command itself")
    parser.add_argument(
        "--kernel", nargs="+", choices=list(hardware.KERNELS), metavar="NAME", help="check these only (default: all)"
    )
    parser.add_argument("--profile", action="store_true", help="read counters and check memory accesses instead")
    gpu_bundle.add_arguments(parser)
    parser.add_argument("--step", choices=["kernels", *STEPS, *gpu_profile.TOOLS], help=argparse.SUPPRESS)
    parser.add_argument("--product", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run all steps, write the result and print it; 1 where a step failed."""
    args = parse(argv)
    if args.bundle:
        return gpu_bundle.main(args)
    if args.step:
        return run_step(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use; --device cpu --quick tests the command without one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes of a step end too
    run = profile(args) if args.profile else measure(args)
    gpu_report.show(run.result, Console(width=None if Console().is_terminal else 150))
    print(run.path)
    return 1 if run.result["errors"] else 0


def measure(args: argparse.Namespace) -> Run:
    """Prove and time: all steps of SECONDS."""
    run = Run(args, SECONDS, ("kernels", *STEPS))
    with building(run) as finish:
        run.step("start", partial(start, run))
        run.step("kernels", partial(kernels, run))
        run.step("build", partial(build, run, finish=finish))
    for name in list(SECONDS)[3:]:
        run.step(name, partial(tests, run) if name == "tests" else partial(timed, run, name))
        if run.device.type == "cuda":
            run.ship_times()
    return run


def profile(args: argparse.Namespace) -> Run:
    """Counters and memcheck: all steps of gpu_profile.SECONDS."""
    run = Run(args, gpu_profile.SECONDS, tuple(gpu_profile.TOOLS), "-profile")
    with building(run) as finish:
        run.step("start", partial(start, run))
        run.step("counters", partial(gpu_profile.counters, run))
        run.step("build", finish)
    run.step("memcheck", partial(gpu_profile.memcheck, run))
    return run


if __name__ == "__main__":
    sys.exit(main())
