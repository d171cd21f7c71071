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
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for name, fact in _facts(devices).items():  # a line each: a table would fold paths and reasons in a narrow terminal
        console.print(f"{name:<17}{fact}", markup=False, highlight=False, soft_wrap=True)
    console.print(_plans(devices[:1]))
    console.print(_kernels(devices))
    console.print(
        '"native", the C++ kernels for CPUs, is proved by `gci-kernels verify`; the kernels for GPUs, in Triton and '
        "CUDA C++, are proved GPU by GPU, by `gci-kernels verify --device cuda` or at their first use."
    )


def _facts(devices: list[torch.device]) -> dict[str, str]:
    return {
        "gci_kernels": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **{package: _version(package) for package in ("torch", "triton", "transformers", "peft")},
        "CPU threads": str(torch.get_num_threads()),
        "C++ kernels": f"built, {native.ISA}" if native.available() else f"missing: {native.why_unavailable()}",
        "CUDA kernels": f"{native.CUDA_BUILD}; for other GPUs: GCI_CUDA_ARCH_LIST=9.0a pip install ...",
        "OpenMP runtimes": ", ".join(openmp_runtimes()) or "unknown",
        "GPUs": ", ".join(torch.cuda.get_device_name(device) for device in devices) or "none",
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
        kind, proved = device.type, None
        if kind == "cuda":  # as it stands: info runs no self check
            proved = frozenset(kernel for kernel in hardware.KERNELS if hardware.state(kernel, device) == "proved")
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            name = str(dtype).removeprefix("torch.")
            for tokens in (1, 2048):
                plans.add_row(
                    kind, name, str(tokens), str(choose_plan("auto", tokens, dtype, kind, "gate", proved=proved))
                )
            step = choose_decode(
                tokens=1, columns=40, experts=8, dtype=dtype, adapter_dtype=dtype, device_type=kind, proved=proved
            )
            if step is not None:
                plans.add_row(kind, name, "1, generating", str(step))
    return plans


def _kernels(devices: list[torch.device]) -> Table | str:
    """Kernels by GPU: the ones of this machine; without any, those that the shipped records name."""
    gpus = [torch.cuda.get_device_name(device) for device in devices] or [r.gpu for r in hardware.shipped()]
    if not gpus:
        return f"GPU kernels: no GPU here, and {NO_RECORD}."
    cells: dict[tuple[str, str], hardware.Record | None] = {}
    for kernel in hardware.KERNELS:
        cells |= {(kernel, gpu): hardware.find(kernel, device) for gpu, device in zip(gpus, devices, strict=False)}
        shipped = [record for record in hardware.shipped() if record.kernel == kernel and not devices]
        cells |= {(kernel, record.gpu): record for record in shipped if record.digest == hardware.digest(kernel)}
    gpus = list(dict.fromkeys(gpus))
    table = Table("GPU kernel", title="What is proved where")
    for gpu in gpus:
        table.add_column(escape(gpu))
    for kernel in hardware.KERNELS:
        without = hardware.missing(kernel) or "no record"
        table.add_row(kernel, *(escape(_short(cells.get((kernel, gpu))) or without) for gpu in gpus))
    return table


def _short(record: hardware.Record | None) -> str:
    """With its file's name alone, so that the table fits a terminal."""
    return str(dataclasses.replace(record, source=Path(record.source).name)) if record else ""
