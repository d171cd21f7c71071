"""Which GPU a tensor's device is."""

import functools

import torch

from gci_kernels.hardware.chips import chip_of_capability


@functools.cache
def device_capability(device: torch.device) -> str:
    """The compiler's name of the chip, "sm_90" or "gfx942"; "sm_90" for any device that is no GPU (interpreter)."""
    if device.type != "cuda":
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; for any other device those of the chip that it is taken for."""
    if device.type != "cuda":
        return chip_of_capability(device_capability(device)).processors
    return torch.cuda.get_device_properties(device).multi_processor_count
