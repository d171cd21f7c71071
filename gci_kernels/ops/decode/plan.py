"""Which kernels run a decoding step: a pure function of sizes, dtypes and device."""

from dataclasses import dataclass

import torch

from gci_kernels import hardware, native
from gci_kernels.limits import MAX_DECODE_COLUMNS, MAX_DECODE_HEAD_SIZE, MAX_DECODE_TOKENS, MAX_EXPERTS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Device -> the dtypes of x that its kernels were built for.
_BUILT = {"cpu": _DTYPES if native.available() else (), "cuda": _DTYPES if native.CUDA_DIGEST else ()}


@dataclass(frozen=True)
class DecodePlan:
    """What a step launches, in order; printable. One entry is one kernel, or one product of the library."""

    launches: tuple[str, ...]

    def __str__(self) -> str:
        return " + ".join(self.launches)


# A CPU multiplies with the base weight in the same call, for one reading of x and one meeting of the threads.
_CPU = DecodePlan(("decode",))
_GPU = DecodePlan(("base product", "decode_project", "decode_expand"))
_GPU_ATTENTION = DecodePlan(("base product", "decode_attend", "decode_expand"))


def has_kernels(dtype: torch.dtype, device_type: str, attends: bool = False) -> bool:
    """Whether steps of x in `dtype` have kernels that "auto" may take; on a GPU its first call may check them."""
    if dtype not in _BUILT.get(device_type, ()):
        return False
    return device_type == "cpu" or all(map(hardware.proves, _needed(attends)))


def _needed(attends: bool) -> tuple[str, ...]:
    return ("decode_step", "decode_attend") if attends else ("decode_step",)


def choose_decode(
    *, tokens: int, columns: int, experts: int, dtype: torch.dtype, adapter_dtype: torch.dtype, device_type: str,
    head: int | None = None, proved: frozenset[str] | None = None,
) -> DecodePlan | None:  # fmt: skip
    """The plan of a step of `tokens` tokens, None where the stages of training take it.

    Args:
        columns, experts: the most that an adapter of the step has; columns as in :class:`Group`.
        dtype, adapter_dtype: of x, and of the adapters.
        head: the most columns that one of ALoRA's heads has, None for adapters without attention.
        proved: the kernels, keys of hardware.KERNELS, that work on the GPU; None: hardware.proves is asked about the
            current one, which may check a kernel at its first use.
    """
    fits = 1 <= tokens <= MAX_DECODE_TOKENS and columns <= MAX_DECODE_COLUMNS and experts <= MAX_EXPERTS
    fits = fits and (head is None or head <= MAX_DECODE_HEAD_SIZE)
    if not (fits and dtype in _BUILT.get(device_type, ()) and adapter_dtype in (dtype, torch.float32)):
        return None
    if device_type == "cpu":
        return _CPU
    if not all(hardware.proves(kernel) if proved is None else kernel in proved for kernel in _needed(head is not None)):
        return None
    return _GPU if head is None else _GPU_ATTENTION
