"""Which implementation computes the attention: a pure function of the number of tokens, dtype and device."""

import torch

from gci_kernels import hardware
from gci_kernels.impl import check_runs, native_obstacle, triton_obstacle

# Tokens from which the Triton kernels are expected to be faster than library products on a GPU: a prediction, nothing
# is measured yet.
_TRITON_FROM = 16


def choose_attention(
    impl: str, *, tokens: int, dtype: torch.dtype, device_type: str, proved: frozenset[str] | None = None
) -> str:
    """The implementation for q of `tokens` tokens: "reference", "aten", "native" or "triton".

    "auto" is the C++ kernels on a CPU and, on a GPU, the Triton kernels if they have been proved on it; where those
    cannot run, it is library products ("aten").

    Args:
        impl: one of gci_kernels.impl.IMPLS. There is no attention in "upcast" products: a plan that has them for its
            other stages asks for "auto" here.
        tokens: of all batch rows together.
        dtype, device_type: of q, k and v.
        proved: names of the kernels that work on the GPU; None: hardware.proves is asked about the current GPU, which
            may check the kernel at its first use.

    Raises:
        ValueError: the implementation that is asked for cannot run.
    """
    if impl == "upcast":
        raise ValueError("impl='upcast' cannot run here: it is of the products of linear layers; attention has none")
    if impl != "auto":
        check_runs(impl, device_type, dtype)
        return impl
    if device_type != "cuda":
        return "aten" if native_obstacle(device_type, dtype) else "native"
    if tokens < _TRITON_FROM or triton_obstacle(device_type, dtype):
        return "aten"
    works = hardware.proves("attention") if proved is None else "attention" in proved
    return "triton" if works else "aten"
