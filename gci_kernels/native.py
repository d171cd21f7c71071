"""Loads the compiled extension (csrc/), and says what it can run.

torch is imported first on purpose: the extension then shares torch's OpenMP runtime and its pool of threads.
"""

import importlib
from types import ModuleType

import torch

from gci_kernels import limits


def _load() -> ModuleType:
    """The extension; ImportError where it is missing or does not belong to these Python files."""
    module = importlib.import_module("gci_kernels._native")
    expected = {name.lower(): value for name, value in vars(limits).items() if name.isupper()}
    if getattr(module, "limits", None) != expected:
        raise ImportError(f"{module.__file__} was built from other sources: its limits are not those of limits.py")
    return module


_extension: ModuleType | None = None
_failure: ImportError | None = None
try:
    _extension = _load()
except ImportError as failure:
    _failure = failure


def available() -> bool:
    """Whether the compiled extension could be loaded."""
    return _extension is not None


def why_unavailable() -> str:
    """The loader's message where :func:`available` is false, else an empty string."""
    return "" if _failure is None else str(_failure)


def extension() -> ModuleType:
    """The compiled extension; ImportError with the reason and the remedy where it could not be loaded."""
    if _extension is None:
        raise ImportError(
            f"gci_kernels._native could not be loaded ({_failure}); it is built by `pip install`, which needs a C++17 "
            "compiler with OpenMP. In a source checkout use `pip install -e .`, or run from another folder"
        )
    return _extension


def cuda_extension() -> ModuleType:
    """The compiled extension with its CUDA kernels; ImportError with the reason and the remedy where it has none."""
    module = extension()
    if not module.has_cuda:
        raise ImportError(
            f"gci_kernels' CUDA kernels: {CUDA_BUILD}. They need nvcc 12.4 to 13.x when gci_kernels is installed; with "
            "GCI_BUILD_CUDA=1 the installation fails where it cannot build them"
        )
    return module


#: The extension's numbers for dtypes, DType in csrc/common/kernels.h; empty without the extension.
DTYPE_CODES: dict[torch.dtype, int] = {
    getattr(torch, name): code for name, code in (_extension.dtype_codes.items() if _extension is not None else ())
}
#: What was built of csrc/cuda, "sm_90a, by nvcc 13.0", or "not built: " and why. Neither says that there is a GPU.
CUDA_BUILD: str = _extension.cuda_build if _extension is not None else "none"
#: The compiler of csrc/cuda, "nvcc 13.0", and sha256 over its name and sources; empty where nothing was built.
CUDA_COMPILER: str = _extension.cuda_compiler if _extension is not None else ""
CUDA_DIGEST: str = _extension.cuda_digest if _extension is not None else ""
#: The CPU instruction sets of this build, each including those before it; empty without the extension.
ISAS: tuple[str, ...] = _extension.isas if _extension is not None else ()
#: The one in use; "none" without the extension. A constant, so that torch.compile traces through plans.
ISA: str = _extension.isa() if _extension is not None else "none"


def driver_obstacle() -> str:
    """Why this machine's driver cannot run the CUDA kernels, in one sentence; empty where it can or there is none.

    A driver runs what was built for its own major version of CUDA and for earlier ones.
    """
    asked = getattr(torch._C, "_cuda_getDriverVersion", None)  # not there in a PyTorch for CPUs
    driver = asked() if asked is not None else 0
    needed = CUDA_COMPILER.removeprefix("nvcc ").partition(".")[0]
    if not driver or not needed or driver // 1000 >= int(needed):
        return ""
    return (
        f"built by {CUDA_COMPILER}, which the driver of this machine, for CUDA {driver // 1000}.{driver % 1000 // 10}, "
        f"is too old for: install a driver for CUDA {needed}, or gci_kernels with nvcc of CUDA {driver // 1000}"
    )
