"""Whether a kernel made for a few tokens runs an adapter's step: a pure function of sizes, dtypes and device."""

import torch

from gci_kernels import native

#: The tokens of a step at most, all sequences together.
MAX_TOKENS = 16
_MAX_COLUMNS = 512  # of A, router rows included
_MAX_EXPERTS = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_kernels(dtype: torch.dtype, device_type: str) -> bool:
    """Whether any step of x in `dtype` has a kernel; where none has, the stages of training are better left whole."""
    return device_type == "cpu" and dtype in _DTYPES and native.available()


def choose_decode(
    *, tokens: int, columns: int, experts: int, dtype: torch.dtype, adapter_dtype: torch.dtype, device_type: str
) -> str | None:
    """ "native" where the C++ kernel takes the step, None where the stages of training do."""
    fits = 1 <= tokens <= MAX_TOKENS and columns <= _MAX_COLUMNS and experts <= _MAX_EXPERTS
    known = has_kernels(dtype, device_type) and adapter_dtype in (dtype, torch.float32)
    return "native" if fits and known else None
