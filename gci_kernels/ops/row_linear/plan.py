"""How a linear layer with trained rows is computed: a pure function of sizes, dtype and device."""

from collections.abc import Mapping

import torch

from gci_kernels import hardware, native
from gci_kernels.impl import check_impl, check_runs, triton_obstacle
from gci_kernels.ops.upcast import upcast_from

#: "kept": the caller keeps a copy of W that holds the active rows; "merge": such a copy is made for each product;
#: "overwrite": W is used, and the outputs of its rows at the active positions are replaced; "upcast": the active rows
#: are written into each block of W that is converted to float32; "triton": the kernel reads each row from where it is.
FORMS = ("kept", "merge", "overwrite", "upcast", "triton")

#: Why impl="native" cannot run.
NO_NATIVE = "the products of loki_linear are the library's on a CPU"

# Tokens from which comparing the kept copy's active rows costs less than computing their outputs a second time.
_KEPT_FROM = 16
# Tokens times the share of active rows from which copying W costs less than computing the active rows' outputs twice:
# one number of W read and written against two operations a token. On a CPU measured with 2 threads in float32; on a
# GPU a prediction.
_MERGE_FROM = {"cpu": 80, "cuda": 300}
# Columns to a multiple of which a GPU's matrices are widened; 8 would do for 16-bit dtypes, and 16 divide tiles evenly.
_ALIGNED = 16


def choose_form(
    impl: str, *, tokens: int, share: float, dtype: torch.dtype, device_type: str, keep: bool,
    device: torch.device | None = None, starts: Mapping[str, int | None] | None = None, isa: str | None = None,
    library: bool | None = None,
) -> str:  # fmt: skip
    """One of :data:`FORMS`, or "reference"; a pure function once `starts`, `isa` and `library` are given.

    Args:
        impl: one of gci_kernels.impl.IMPLS.
        tokens: of x.
        share: of the rows that are active, in (0, 1].
        dtype, device_type: of x.
        keep: whether the caller keeps a copy of W.
        device: x's, on a GPU; None: the current GPU.
        starts: kernel -> the fewest tokens from which it is no slower than the copy and the library's product, for
            those that are proved; None: hardware.start is asked, which may check and time the kernel at its first use.
        isa: the CPU's instruction set; None: this one's.
        library: whether PyTorch has a fast product of `dtype` on this CPU; None: PyTorch is asked.

    Raises:
        ValueError: `impl` is unknown, or the implementation that is asked for cannot run, as "native" never can.
    """
    if impl not in ("auto", "aten"):
        check_impl(impl)
        if impl == "native":
            raise ValueError(f"impl={impl!r} cannot run here: {NO_NATIVE}")
        check_runs(impl, device_type, dtype)
        return impl
    if impl == "auto" and device_type == "cpu":
        start = upcast_from(dtype, native.ISA if isa is None else isa, library)
        if start is not None and tokens >= start:
            return "upcast"
    if keep and tokens >= _KEPT_FROM:
        return "kept"
    if impl == "auto" and device_type == "cuda" and triton_obstacle(device_type, dtype) is None:
        if hardware.takes("row_linear", tokens, dtype, device, starts=starts):
            return "triton"
    return "merge" if tokens * share >= _MERGE_FROM.get(device_type, _MERGE_FROM["cuda"]) else "overwrite"


def padded(k: int, device_type: str) -> int:
    """How many columns a matrix of k columns is stored with.

    On a GPU a multiple of 16, so that all rows start at multiples of 16 bytes: the library's fast products load as many
    at a time, and it has slower ones for other rows. On a CPU k.
    """
    return k if device_type == "cpu" else -(-k // _ALIGNED) * _ALIGNED
