"""`python -m bench.gpu --profile`: hardware counters of the products, and memcheck of one launch of each kernel.

Both are NVIDIA's tools, ncu and compute-sanitizer, each around a process of its own that does one thing. The counters
are those of a few of ncu's sections, which take seconds a kernel; clocks are left as they are. On a CPU the same
processes run without the tools.
"""

import csv
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gci_kernels import hardware
from gci_kernels.proof.verify import obstacle

from . import gpu_cases
from .cases import layer_shape
from .gpu_processes import Ended, run_all
from .gpu_run import Run
from .gpu_stages import Entry, stages_in

#: The steps of this command, and the seconds of each in a run of 540.
SECONDS = {"start": 10, "counters": 310, "build": 20, "memcheck": 200}
#: The tool of each step.
TOOLS = {"counters": "ncu", "memcheck": "compute-sanitizer"}
#: Method and stage of every product whose counters are read; LoRA's first.
PRODUCTS = tuple(
    ("lora", stage)
    for stage in ("forward: expand", "backward: dX", "backward: dU, dB", "backward: dA", "forward: project")
) + (("loki", "forward"), ("loki", "backward: dX"))
_SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats", "LaunchStats", "Occupancy"
)  # fmt: skip
_MARK = re.compile(r"gci=([^;]+);")  # in the name of a range: which implementation runs
_FOUND = 77  # the exit status that stands for errors that compute-sanitizer has found
_LIMIT = 120  # seconds for one process


def counters(run: Run, limit: float) -> None:
    """Read the counters of each product by all its implementations, one after the other: ncu wants the GPU alone.

    Raises:
        RuntimeError: the tool is missing, or a process failed.
    """
    until = time.monotonic() + limit
    for method, stage in PRODUCTS:
        name = f"{method} {stage}"
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder, "counters.csv")
            command = [*_ncu(run, table), *run.child("--step", "counters", "--product", method, stage)]
            how = _run(run, {name: command}, until, at_once=1, variables={})[name]
            found = read_counters(table.read_text(errors="replace")) if table.exists() else []
        entry: Entry = {"name": name, "method": method, "seconds": how.seconds, "kernels": found}
        if how.trouble:
            entry["error"] = how.trouble
        elif run.device.type == "cuda" and not found:
            entry["error"] = "ncu ended well and wrote no counters"
        run.add("counters", entry)
    _raise_wrong(run, "counters")


def _ncu(run: Run, table: Path) -> list[str]:
    """ncu with all options; nothing on a CPU."""
    tool = _tool(run, "counters")
    if tool is None:
        return []
    sections = [option for section in _SECTIONS for option in ("--section", section)]
    return [
        tool, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(table), "--clock-control", "none",
        "--target-processes", "all", "--profile-from-start", "off", "--nvtx", *sections,
        "--metrics", "dram__bytes_read.sum,dram__bytes_write.sum",
    ]  # fmt: skip


def memcheck(run: Run, limit: float) -> None:
    """One launch of each kernel under compute-sanitizer's memcheck, side by side.

    Raises:
        RuntimeError: the tool is missing, or it has found something.
    """
    tool, until = _tool(run, "memcheck"), time.monotonic() + limit
    options = [] if tool is None else [tool, "--tool", "memcheck", "--error-exitcode", str(_FOUND)]
    names = [name for name in run.chosen() if not hardware.missing(name)]
    run.result["left_out"] |= {name: hardware.missing(name) for name in run.chosen() if hardware.missing(name)}
    commands = {name: [*options, *run.child("--step", "memcheck", "--kernel", name)] for name in names}
    # Tensors are not cut from one large block then, whose neighbours the tool could not tell from them.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name, how in _run(run, commands, until, at_once=run.result["machine"]["cores"], variables=variables).items():
        entry: Entry = {"name": f"{name}, memcheck", "kernel": name, "seconds": how.seconds}
        if how.trouble:
            found = "memcheck found errors: " if how.status == _FOUND else ""
            entry["error"] = found + how.trouble
        run.add("memcheck", entry)
    _raise_wrong(run, "memcheck")


def _tool(run: Run, step: str) -> str | None:
    """The path of a step's tool; None on a CPU, where the programs run without it.

    Raises:
        RuntimeError: it is not here.
    """
    name = TOOLS[step]
    if run.device.type == "cpu":
        run.result["left_out"][name] = f"{name} examines GPUs: on a CPU its programs run without it"
        return None
    path = run.result["tools"][name]
    if path is None:
        raise RuntimeError(
            f"{name} is not here: neither in PATH, nor in CUDA_HOME's bin, nor in /usr/local/cuda*/bin or "
            "/opt/nvidia/nsight-compute"
        )
    return path


def _run(
    run: Run, commands: dict[str, list[str]], until: float, *, at_once: int, variables: dict[str, str]
) -> dict[str, Ended]:
    """Run processes within _LIMIT seconds, and not past `until`."""
    limit = min(until - time.monotonic(), _LIMIT * run.scale)
    end = time.monotonic() + limit
    if run.device.type == "cpu":
        variables = variables | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return run_all(
        commands, at_once=at_once, environments=dict.fromkeys(commands, variables),
        stop=lambda: f"still running after {limit:.0f} s" if time.monotonic() > end else "",
    )  # fmt: skip


def _raise_wrong(run: Run, step: str) -> None:
    wrong = [f"{entry['name']}: {entry['error']}" for entry in run.result[step] if "error" in entry]
    if wrong:
        raise RuntimeError("; ".join(wrong)[:2000])


def read_counters(text: str) -> list[dict[str, Any]]:
    """The kernels in what ncu wrote: "kernel", "by" (the implementation that launched it) and all numeric "metrics".

    Before the table there are lines about what ncu did, and its second row has the units.
    """
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return []
    kernels = []
    for row in csv.DictReader(lines[first:]):
        if not row["ID"]:
            continue
        marks = [_MARK.search(value or "") for column, value in row.items() if column and "Push/Pop" in column]
        metrics = {name: _number(value) for name, value in row.items() if name and "__" in name}
        kernels.append({
            "kernel": row["Kernel Name"],
            "by": next((mark[1] for mark in marks if mark), ""),
            "metrics": {name: value for name, value in metrics.items() if value is not None},
        })  # fmt: skip
    return kernels


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


# What the processes do


def product(method: str, stage: str, sizes: gpu_cases.Sizes, device: torch.device) -> None:
    """Run one stage by each of its implementations; ncu looks at the second time alone.

    Raises:
        ValueError: the method has no such stage.
    """
    on_gpu = device.type == "cuda"
    runs = dict(_implementations(method, stage, sizes, device))
    if not runs:
        raise ValueError(f"{method} has no stage {stage!r}")
    for run in runs.values():
        run()
    if not on_gpu:
        return
    torch.cuda.synchronize(device)
    torch.cuda.profiler.start()
    for name, run in runs.items():
        torch.cuda.nvtx.range_push(f"gci={name};")
        run()
        torch.cuda.synchronize(device)
        torch.cuda.nvtx.range_pop()
    torch.cuda.profiler.stop()


def _implementations(
    method: str, stage: str, sizes: gpu_cases.Sizes, device: torch.device
) -> Iterator[tuple[str, Callable[[], object]]]:
    dtype = torch.bfloat16
    shape = layer_shape(method, sizes.tokens, sizes.features, sizes.features)
    for kernel in hardware.KERNELS.values():
        found = stages_in("", kernel, shape, dtype, device).get(stage)
        if found is not None:
            for name, implementation in found.implementations.items():
                if "triton" not in name or obstacle("triton", device.type, dtype) is None:
                    yield name, partial(implementation, found.operands, dtype)
