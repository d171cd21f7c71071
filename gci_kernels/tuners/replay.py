"""Which decoding steps of ALoRA may be replayed as a graph: those that kernels take in every adapted layer."""

import torch

from gci_kernels.limits import MAX_DECODE_TOKENS
from gci_kernels.ops.decode import has_kernels


def may_replay(batch: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels take a step of one token for each of `batch` sequences, and read the past's length on `device`.

    Args:
        batch: the number of sequences.
        dtype: of the layers' input and of the keys and values that they store.
        device: of the layers; on a GPU the first call may check the kernels there.
    """
    if batch > MAX_DECODE_TOKENS or torch.is_autocast_enabled(device.type):
        return False
    return has_kernels(dtype, device.type, attends=True)
