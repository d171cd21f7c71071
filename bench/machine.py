"""The machine, the versions and the commit that a number was measured with, and the file that it is written to."""

import glob
import json
import os
import platform
import re
import shutil
import subprocess
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gci_kernels.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
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
    named = re.search(r"^model name\s*:(.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that numbers depend on; None where one isn't installed."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {"python": platform.python_version(), **{package: installed(package) for package in PACKAGES}}


#: Where NVIDIA's tools are installed, beside the folders in PATH and that of CUDA_HOME.
_TOOL_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda-*/bin", "/opt/nvidia/nsight-compute/*")


def find_tool(name: str) -> str | None:
    """The path of one of NVIDIA's programs; None where it is not here."""
    home = os.environ.get("CUDA_HOME")
    folders = [Path(home, "bin")] if home else []
    folders += [Path(folder) for pattern in _TOOL_FOLDERS for folder in sorted(glob.glob(pattern), reverse=True)]
    return shutil.which(name) or next((found for folder in folders if (found := shutil.which(name, path=folder))), None)


def tools() -> dict[str, str | None]:
    """The paths of the programs that build and examine GPU code; None where one is not here."""
    return {name: find_tool(name) for name in ("nvcc", "ncu", "compute-sanitizer")}


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not installed, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def gpu_software() -> dict[str, str | None]:
    """The driver, the CUDA that torch was built with, and the compiler; None where there is none."""
    nvcc = re.search(r"release (\S+?),", _output("nvcc", "--version") or "")
    return {
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "nvcc": nvcc[1] if nvcc else None,
    }


def commit(root: Path = ROOT) -> dict | None:
    """The commit of the checkout `root` ("sha"), and whether files were "changed" since; None where it is none."""
    git = partial(_output, "git", "-C", str(root))
    # An environment may be inside another project's checkout, whose commit is not this project's.
    toplevel = git("rev-parse", "--show-toplevel")
    sha = git("rev-parse", "HEAD")
    if toplevel is None or sha is None or Path(toplevel).resolve() != root:
        return None
    return {"sha": sha, "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}


def environment(device: torch.device) -> dict[str, dict | None]:
    """The machine, the versions and the commit, under these names."""
    return {"machine": machine(device), "versions": versions(), "commit": commit()}


def write_json(path: Path, content: object) -> None:
    """Writes a result as JSON, whole or not at all: a reader never gets half a file."""
    write_whole(path, json.dumps(content, indent=1) + "\n")
