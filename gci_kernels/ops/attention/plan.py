"""Which implementation computes the attention: a pure function of the number of tokens, dtype and device."""

from collections.abc import Mapping

import torch

from gci_kernels import hardware
from gci_kernels.impl import check_runs, native_obstacle, triton_obstacle


def choose_attention(
    impl: str, *, tokens: int, dtype: torch.dtype, device_type: str, device: torch.device | None = None,
    starts: Mapping[str, int | None] | None = None,
) -> str:  # fmt: skip
    """The implementation for q of `tokens` tokens: "reference", "aten", "native" or "triton".

    "auto" is the C++ kernels on a CPU and, on a GPU, the Triton kernels if they have been proved on it, but for fewer
    than 16 tokens; elsewhere it is library products ("aten").

    Args:
        impl: one of gci_kernels.impl.IMPLS. There is no attention in "upcast" products: a plan that has them for its
            other stages asks for "auto" here.
        tokens: of all batch rows together.
        dtype, device_type: of q, k and v.
        device: of q, k and v on a GPU; None: the current GPU.
        starts: kernel -> the fewest tokens from which it is taken, for those that are proved; None: hardware.start is
            asked, which may check the kernel at its first use.

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
    if triton_obstacle(device_type, dtype) is None and hardware.takes(
        "attention", tokens, dtype, device, starts=starts
    ):
        return "triton"
    return "aten"
