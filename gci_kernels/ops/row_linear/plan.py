"""Where a linear layer with trained rows takes them from: a pure function of sizes, dtype and device."""

import torch

from gci_kernels import hardware, native
from gci_kernels.impl import triton_obstacle
from gci_kernels.ops.upcast import upcast_from, upcast_obstacle

#: "kept": a copy of W that the caller keeps has them; "merge": a copy is made for the call; "overwrite": what W's own
#: rows gave is replaced; "upcast": they are put into each block of W that is converted to float32; "triton": the kernel
#: reads each row from where it is.
FORMS = ("kept", "merge", "overwrite", "upcast", "triton")

NO_NATIVE = "the products of loki_linear are the library's on a CPU"

# Tokens from which comparing the kept copy's active rows costs less than computing their outputs a second time.
_KEPT_FROM = 16
# Tokens times the active share of the rows from which copying W costs less than that second time: reading and writing
# a number of W against two operations a token. On a CPU measured with 2 threads in float32; on a GPU a prediction.
_MERGE_FROM = {"cpu": 80, "cuda": 300}
# Tokens from which the Triton kernel is expected to be faster than the copy and the library's product; a prediction.
_TRITON_FROM = 512


def choose_form(
    impl: str, *, tokens: int, share: float, dtype: torch.dtype, device_type: str, keep: bool,
    proved: frozenset[str] | None = None, isa: str | None = None, library: bool | None = None,
) -> str:  # fmt: skip
    """One of :data:`FORMS` for x [tokens, in] of `dtype`; a pure function, once proved, isa and library are given.

    Args:
        impl: "auto", "reference", which is no form of the op, "aten", "upcast", "triton", or "native", which there is
            none of.
        share: of the rows that are active, in (0, 1].
        keep: whether the caller keeps a copy of W.
        proved: the kernels, keys of hardware.KERNELS, that work on the GPU; None: hardware.proves is asked about the
            current one, which may check the kernel at its first use.
        isa: the CPU's instruction set; None: this one's.
        library: whether PyTorch has a fast product of `dtype` on this CPU; None: it is asked.

    Raises:
        ValueError: an implementation is asked for that cannot run.
    """
    if impl == "reference":
        return "reference"
    if impl == "native":
        raise ValueError(f"impl='native' cannot run here: {NO_NATIVE}")
    obstacle = triton_obstacle(device_type, dtype)
    if impl == "triton":
        if obstacle:
            raise ValueError(f"impl='triton' cannot run here: {obstacle}")
        return "triton"
    if impl == "upcast":
        if obstacle := upcast_obstacle(device_type, dtype):
            raise ValueError(f"impl='upcast' cannot run here: {obstacle}")
        return "upcast"
    if impl == "auto" and device_type == "cpu":
        start = upcast_from(dtype, native.ISA if isa is None else isa, library)
        if start is not None and tokens >= start:
            return "upcast"
    if keep and tokens >= _KEPT_FROM:
        return "kept"
    if impl == "auto" and device_type == "cuda" and obstacle is None and _prefers_triton(tokens, dtype):
        if hardware.proves("row_linear") if proved is None else "row_linear" in proved:
            return "triton"
    return "merge" if tokens * share >= _MERGE_FROM.get(device_type, _MERGE_FROM["cuda"]) else "overwrite"


def _prefers_triton(tokens: int, dtype: torch.dtype) -> bool:
    return tokens >= _TRITON_FROM and dtype != torch.float32
