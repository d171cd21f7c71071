"""Which GPU a tensor's device is."""

import functools

import torch


@functools.cache
def device_capability(device: torch.device) -> str:
    """The compiler's name of the chip, "sm_90" or "gfx942"; "sm_90" for any device that is no GPU (interpreter)."""
    if device.type != "cuda":
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"
