"""`gci-kernels info`: what this machine has, what runs on it, and what never ran on real hardware."""

import dataclasses
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gci_kernels import __version__, hardware, native
from gci_kernels.files import cache_dir
from gci_kernels.ops.bottleneck import choose_plan
from gci_kernels.ops.decode import choose_decode

NO_RECORD = "no record: these kernels have never run on real hardware"


def show(console: Console) -> None:
    """Print everything; nothing is checked or measured for it."""
    devices, without = _gpus()
    for name, fact in _facts(
        devices, without
    ).items():  # a line each: a table would fold paths and reasons in a narrow terminal
        console.print(f"{name:<17}{fact}", markup=False, highlight=False, soft_wrap=True)
    console.print(_plans(devices[:1]))
    console.print(_kernels(devices))
    console.print(
        '"native", the C++ kernels for CPUs, is proved by `gci-kernels verify`; the kernels for GPUs, in Triton and '
        "CUDA C++, are proved GPU by GPU, by `gci-kernels verify --device cuda` or at their first use."
    )


def _gpus() -> tuple[list[torch.device], str]:
    """The GPUs that PyTorch can use here, and, without any, why there is none, in one sentence."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    try:
        if not devices:
            torch.cuda.init()  # which says what is missing
        for device in devices:  # where the driver is broken or too old, GPUs are counted and cannot be used
            torch.cuda.get_device_name(device)
    except (RuntimeError, AssertionError) as error:
        return [], " ".join(str(error).split()).partition(". ")[0].removesuffix(".")
    return devices, "no GPU that PyTorch can use"


def _facts(devices: list[torch.device], without: str) -> dict[str, str]:
    return {
        "gci_kernels": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **{package: _version(package) for package in ("torch", "triton", "transformers", "peft")},
        "CPU threads": str(torch.get_num_threads()),
        "C++ kernels": f"built, {native.ISA}" if native.available() else f"missing: {native.why_unavailable()}",
        "CUDA kernels": native.driver_obstacle()
        or f"{native.CUDA_BUILD}; for other GPUs: GCI_CUDA_ARCH_LIST=9.0a pip install ...",
        "OpenMP runtimes": ", ".join(openmp_runtimes()) or "unknown",
        "GPUs": ", ".join(torch.cuda.get_device_name(device) for device in devices) or f"none: {without}",
        "cache folder": str(cache_dir()),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries in this process (Linux). Two of them are two pools of threads that fight for the cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if re.search(r"lib(g|i)?omp\d*[-.]", line)}
    return sorted(os.path.realpath(path) for path in paths)


def _plans(gpus: list[torch.device]) -> Table:
    plans = Table("device", "dtype", "tokens", "plan of loramoe_linear", title='What impl="auto" runs')
    for device in [torch.device("cpu"), *gpus]:
        kind = device.type
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            name, starts = str(dtype).removeprefix("torch."), None
            if kind == "cuda":  # as it stands: info runs no self check
                starts = {kernel: hardware.recorded(kernel, dtype, device) for kernel in hardware.KERNELS}
            for tokens in (1, 2048):
                plans.add_row(
                    kind, name, str(tokens), str(choose_plan("auto", tokens, dtype, kind, "gate", starts=starts))
                )
            proved = None if starts is None else frozenset(k for k, start in starts.items() if start is not None)
            step = choose_decode(
                tokens=1, columns=40, experts=8, dtype=dtype, adapter_dtype=dtype, device_type=kind, proved=proved
            )
            if step is not None:
                plans.add_row(kind, name, "1, generating", str(step))
    return plans


def _kernels(devices: list[torch.device]) -> Table | str:
    """Kernels by GPU: the ones of this machine; without any, those that the shipped records name."""
    known: dict[str, dict[str, list[hardware.Record]]] = {}  # GPU -> kernel -> records
    for device in devices:
        for kernel in hardware.KERNELS:
            # This machine's own count first.
            found = [*hardware.counting(kernel, device, hardware.own())]
            found = found or [*hardware.counting(kernel, device, hardware.shipped())]
            known.setdefault(torch.cuda.get_device_name(device), {})[kernel] = found
    for record in () if devices else hardware.shipped():
        cells = known.setdefault(record.gpu, {}).setdefault(record.kernel, [])
        if record.digest == hardware.digest(record.kernel):
            cells.append(record)
    if not known:
        return f"GPU kernels: no GPU here, and {NO_RECORD}."
    table = Table("GPU kernel", title="What is proved where")
    for gpu in known:
        table.add_column(escape(gpu))
    for kernel in hardware.KERNELS:
        without = hardware.missing(kernel) or "no record"
        table.add_row(kernel, *(escape(_short(cells.get(kernel, [])) or without) for cells in known.values()))
    return table


def _short(records: list[hardware.Record]) -> str:
    """A line each, with its file's name alone, so that the table fits a terminal."""
    lines = []
    for record in records:
        of = f"{record.variant}: " if record.variant else ""
        lines.append(f"{of}{dataclasses.replace(record, source=Path(record.source).name)}")
    return "\n".join(lines)
