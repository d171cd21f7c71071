"""Names of implementations, and the plan: which implementation runs each stage of an operation."""

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass, fields
from types import ModuleType

import torch

from gci_kernels import native

_HAS_TRITON = importlib.util.find_spec("triton") is not None

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
    """The module gci_kernels.ops.<op>.<impl>, imported when it is first asked for: Triton may not be installed."""
    return importlib.import_module(f"gci_kernels.ops.{op}.{impl}")


@dataclass(frozen=True)
class Plan:
    """One implementation for each stage, of :data:`IMPLS`; printable, and a string for the op's schema."""

    project: str  # x @ [A; router].T and dY @ B
    mix: str  # the mixer, forward and backward
    expand: str  # y = u @ B.T + x @ W.T and dX = dh @ [A; router] + dY @ W
    reduce: str  # dA = dh.T @ x and dB.T = u.T @ dY
    dropout: str

    @property
    def key(self) -> str:
        return "/".join((self.project, self.mix, self.expand, self.reduce, self.dropout))

    @staticmethod
    @functools.cache
    def from_key(key: str) -> "Plan":
        return Plan(*key.split("/"))

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


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
