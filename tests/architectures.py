"""The architectures that kernels are compiled for without a GPU, and what every compiled kernel must keep to."""

import pytest

from gci_kernels.bench.launches import Launch
from gci_kernels.bench.resources import Resources, compile_kernel
from gci_kernels.hardware.chips import CAPABILITIES, chip_of_capability

# One of each kind of limits and matrix instructions; the others' configurations differ from these in few launches.
_IN_EVERY_RUN = ("sm_80", "sm_90", "sm_100", "gfx942")
#: For pytest.mark.parametrize: the compiler's names.
ARCHITECTURES = [name if name in _IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in CAPABILITIES]


def compile_within_limits(launch: Launch, capability: str) -> tuple[Resources, str]:
    """Compiles: shared memory that fits, no spills; what the kernel takes, and its assembly."""
    used, assembly = compile_kernel(launch, capability)
    chip, told = chip_of_capability(capability), f"{capability} {launch.name} {launch}"
    assert used.shared <= chip.shared, f"{told}: {used}"
    # For 48 warps ptxas puts a few words of a loop's start on the stack, for one more program on a multiprocessor.
    assert used.spills == 0 and used.stack <= (16 if chip.warps == 48 else 0), f"{told}: {used}"
    assert used.registers > 0 and used.occupancy > 0, f"{told}: {used}"
    return used, assembly
