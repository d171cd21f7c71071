"""Which kernels compute a decoding step: a pure function of sizes, dtypes and device."""

from dataclasses import dataclass

import torch

from gci_kernels import hardware, native
from gci_kernels.limits import MAX_DECODE_COLUMNS, MAX_DECODE_HEAD_SIZE, MAX_DECODE_TOKENS, MAX_EXPERTS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The dtypes that kernels of this build take, by device type.
BUILT: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": _DTYPES if native.available() else (),
    "cuda": _DTYPES if native.CUDA_DIGEST else (),
}


@dataclass(frozen=True)
class DecodePlan:
    """What a step launches, in order; printable. An entry is a kernel or a product of the library."""

    launches: tuple[str, ...]

    def __str__(self) -> str:
        return " + ".join(self.launches)


# On a CPU the same call computes the base product: x is read once and the threads synchronise once.
_CPU = DecodePlan(("decode",))
_GPU = DecodePlan(("base product", "decode_project", "decode_expand"))
_GPU_ATTENTION = DecodePlan(("base product", "decode_attend", "decode_expand"))


def has_kernels(
    dtype: torch.dtype, device_type: str, attends: bool = False, device: torch.device | None = None
) -> bool:
    """Whether "auto" may use kernels for steps of x in `dtype`; on a GPU the first call may check the kernels.

    Args:
        dtype, device_type: of x.
        attends: whether the adapters have attention.
        device: x's, on a GPU; None: the current GPU.
    """
    if dtype not in BUILT.get(device_type, ()):
        return False
    return device_type == "cpu" or all(hardware.proves(kernel, dtype, device) for kernel in _needed(attends))


def _needed(attends: bool) -> tuple[str, ...]:
    """Names of the kernels that a step on a GPU uses."""
    return ("decode_step", "decode_attend") if attends else ("decode_step",)


def choose_decode(
    *, tokens: int, columns: int, experts: int, dtype: torch.dtype, adapter_dtype: torch.dtype, device_type: str,
    device: torch.device | None = None, head: int | None = None, proved: frozenset[str] | None = None,
) -> DecodePlan | None:  # fmt: skip
    """The plan of a step of `tokens` tokens; None: no kernel takes it, and the stages of training compute it.

    Args:
        columns, experts: the largest numbers that an adapter of the step has; columns as in :class:`Group`.
        dtype, adapter_dtype: of x, and of the adapters.
        device_type: "cpu" or "cuda"; others have no kernels.
        head: the largest number of columns of one of ALoRA's heads, None for adapters without attention.
        device: x's, on a GPU; None: the current GPU.
        proved: names of the kernels that work on the GPU; None: hardware.proves is asked, which may check a kernel at
            its first use.
    """
    fits = 1 <= tokens <= MAX_DECODE_TOKENS and columns <= MAX_DECODE_COLUMNS and experts <= MAX_EXPERTS
    fits = fits and (head is None or head <= MAX_DECODE_HEAD_SIZE)
    if not (fits and dtype in BUILT.get(device_type, ()) and adapter_dtype in (dtype, torch.float32)):
        return None
    if device_type == "cpu":
        return _CPU
    needed = _needed(head is not None)
    if not all(hardware.proves(kernel, dtype, device) if proved is None else kernel in proved for kernel in needed):
        return None
    return _GPU if head is None else _GPU_ATTENTION
