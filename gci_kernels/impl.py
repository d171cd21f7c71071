"""Names of implementations: which there are, why one cannot run, and the module of an op that holds it."""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

from gci_kernels import native

_HAS_TRITON = importlib.util.find_spec("triton") is not None

HALVES = (torch.bfloat16, torch.float16)
# Of the kernels that "native" means; those of ops/decode take float16 too.
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)

#: What `impl=` takes. "reference" is plain PyTorch with autograd's own backward; the others share one hand-written one:
#: "aten", library products; "upcast", the same in float32 for 16-bit tensors on a CPU; "native", C++; "triton".
IMPLS = ("auto", "reference", "aten", "upcast", "native", "triton")


def check_impl(impl: str) -> None:
    """ValueError unless `impl` is one of :data:`IMPLS`."""
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is unknown; allowed: {', '.join(map(repr, IMPLS))}")


@functools.cache
def implementation(op: str, impl: str) -> ModuleType:
    """The module (or package) gci_kernels.ops.<op>.<impl>, imported when it is first asked for."""
    return importlib.import_module(f"gci_kernels.ops.{op}.{impl}")


def native_obstacle(device_type: str, dtype: torch.dtype) -> str | None:
    """Why impl="native" cannot run on such tensors, or None where it can."""
    if device_type != "cpu":
        return f"its kernels run on CPU tensors, not {device_type}"
    if dtype not in _NATIVE_DTYPES:
        return f"its kernels take float32, bfloat16 and float64, not {str(dtype).removeprefix('torch.')}"
    if not native.available():
        return f"the extension could not be loaded: {native.why_unavailable()}"
    return None


def triton_obstacle(device_type: str, dtype: torch.dtype) -> str | None:
    """Why impl="triton" cannot run on such tensors, or None where it can."""
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"its kernels run on GPU tensors, not {device_type} (TRITON_INTERPRET=1 interprets them, slowly)"
    if device_type != "cuda" and dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if not _HAS_TRITON:
        return "the package triton is not installed"
    return None


def upcast_obstacle(device_type: str, dtype: torch.dtype) -> str | None:
    """Why impl="upcast" cannot run on such tensors, or None where it can."""
    if device_type != "cpu":
        return f"its products are for CPU tensors, not {device_type}"
    if dtype not in HALVES:
        return f"its products are for bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


def obstacle(impl: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `impl`, one of :data:`IMPLS`, cannot run on such tensors, or None where it can."""
    asked = {"native": native_obstacle, "triton": triton_obstacle, "upcast": upcast_obstacle}.get(impl)
    return None if asked is None else asked(device_type, dtype)


def check_runs(impl: str, device_type: str, dtype: torch.dtype) -> None:
    """ValueError unless `impl` can run on such tensors."""
    if reason := obstacle(impl, device_type, dtype):
        raise ValueError(f"impl={impl!r} cannot run here: {reason}")
