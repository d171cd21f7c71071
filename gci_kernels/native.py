"""The door to csrc/: loads the extension and says what it can run.

torch is imported first on purpose: the extension then shares torch's OpenMP runtime, and with it one pool of threads.
"""

import torch

try:
    from gci_kernels import _native as _extension  # type: ignore[attr-defined]  # made by the build
except ImportError as failure:
    _extension = None
    _failure: ImportError | None = failure
else:
    _failure = None

# The order of csrc/common/kernels.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2, torch.float16: 3}


def available() -> bool:
    """Whether the compiled extension could be loaded."""
    return _extension is not None


def why_unavailable() -> str:
    """The loader's own words where :func:`available` is false, else an empty string."""
    return "" if _failure is None else str(_failure)


def extension():
    """The compiled extension, or ImportError with the reason and the cure."""
    if _extension is None:
        raise ImportError(
            f"gci_kernels._native could not be loaded ({_failure}); it is built by `pip install`, which needs a C++17 "
            "compiler with OpenMP. In a source checkout use `pip install -e .`, or run from another folder"
        )
    return _extension


def cuda_extension():
    """The compiled extension where its CUDA kernels were built, else ImportError with the reason and the cure."""
    if not extension().has_cuda:
        raise ImportError(
            f"gci_kernels' CUDA kernels: {CUDA_BUILD}. They need nvcc 12.4 to 13.x when gci_kernels is installed; with "
            "GCI_BUILD_CUDA=1 the installation fails where it cannot build them"
        )
    return _extension


#: What was built of csrc/cuda, "sm_90a, by nvcc 13.0", or "not built: " and why. Neither says that there is a GPU.
CUDA_BUILD: str = _extension.cuda_build if _extension is not None else "none"
#: Which compiler that was, "nvcc 13.0", and sha256 over it and what it compiled; empty where nothing was built.
CUDA_COMPILER: str = _extension.cuda_compiler if _extension is not None else ""
CUDA_DIGEST: str = _extension.cuda_digest if _extension is not None else ""
#: The CPU instruction sets that kernels may be built for, each holding those before it.
ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
#: The one in use; "none" without the extension.
#: A constant, so that torch.compile traces through plans.
ISA: str = _extension.isa() if _extension is not None else "none"
