"""The machine, the versions and the commit that a number was measured with."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ["gci_kernels", "torch", "transformers", "peft", "triton", "numpy"]


def machine(device: torch.device) -> dict:
    """The processor, the cores this process may use, torch's threads, the present load and, on CUDA, the GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.platform(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that numbers depend on; None where one isn't installed."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {"python": platform.python_version(), **{package: installed(package) for package in PACKAGES}}


def gpu_software() -> dict[str, str | None]:
    """The driver, the CUDA that torch was built with, and the compiler; None where there is none."""

    def output(*command: str) -> str | None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    nvcc = re.search(r"release (\S+?),", output("nvcc", "--version") or "")
    return {
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "nvcc": nvcc[1] if nvcc else None,
    }


def commit() -> dict | None:
    """The commit of this file's checkout ("sha"), and whether files were "changed" since; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An environment may be inside another project's checkout, whose commit is not this project's.
    toplevel = git("rev-parse", "--show-toplevel")
    sha = git("rev-parse", "HEAD")
    if toplevel is None or sha is None or Path(toplevel).resolve() != root:
        return None
    return {"sha": sha, "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
