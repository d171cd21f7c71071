"""The GPUs that the package knows: their limits, by which launch configurations are chosen, and their peak rates.

Limits are those of a compute capability ("Technical Specifications per Compute Capability" of NVIDIA's CUDA C++
Programming Guide; AMD's CDNA 3 instruction set manual). Counts and rates are those of a product, from the maker's data
sheet: NVIDIA A100, A10, L4, L40S, H100 (SXM), H200 (SXM), HGX B200 and B300 (an eighth of the board), GB300 NVL72 (a
72nd of the rack); NVIDIA's architecture whitepapers for GeForce RTX 3090, 4090 and 5090 and RTX PRO 6000 Blackwell; AMD
Instinct MI300X. Rates are of dense matrix products, those of bfloat16 and float16 with sums in float32.
"""

import functools
import math
import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Chip:
    """One GPU product.

    Args:
        name: short; where the driver's name of a GPU has all of its words, it is this product.
        capability: the compiler's name of the architecture: "sm_90", "gfx942".
        processors: multiprocessors (AMD: compute units).
        shared: bytes of shared memory that one program may take.
        processor_shared: bytes of shared memory that a multiprocessor has.
        registers: of 32 bits, on a multiprocessor; on AMD, for one lane of a SIMD.
        warps: resident on a multiprocessor at most.
        cache: bytes of the last-level cache.
        async_products: whether matrix units read their operands from shared memory (wgmma, tcgen05), so that registers
            hold the sums alone.
        bandwidth: bytes a second between memory and chip; NaN where it is not known, like the rates below.
        half: bfloat16 and float16 operations a second.
        single: float32 operations a second, without TF32.
    """

    name: str
    capability: str
    processors: int
    shared: int
    processor_shared: int
    registers: int
    warps: int
    cache: int
    async_products: bool = False
    bandwidth: float = math.nan
    half: float = math.nan
    single: float = math.nan

    @property
    def target(self) -> tuple[str, int | str, int]:
        """What triton.backends.compiler.GPUTarget takes: backend, architecture, threads of a warp."""
        number = _sm_number(self.capability)
        return ("cuda", number, 32) if number else ("hip", self.capability, 64)


def _sm_number(capability: str) -> int:
    """90 of "sm_90"; 0 where it is not an architecture of NVIDIA."""
    found = re.fullmatch(r"sm_(\d+)[a-z]?", capability)
    return int(found[1]) if found else 0


_KIB, _MIB = 1024, 1024**2

_A100 = Chip(
    "a100", "sm_80", processors=108, shared=163 * _KIB, processor_shared=164 * _KIB, registers=65536, warps=64,
    cache=40_000_000, bandwidth=2.04e12, half=312e12, single=19.5e12,
)  # fmt: skip
_A10 = Chip(
    "a10", "sm_86", processors=72, shared=99 * _KIB, processor_shared=100 * _KIB, registers=65536, warps=48,
    cache=6 * _MIB, bandwidth=600e9, half=125e12, single=31.2e12,
)  # fmt: skip
_RTX_4090 = Chip(
    "rtx-4090", "sm_89", processors=128, shared=99 * _KIB, processor_shared=100 * _KIB, registers=65536, warps=48,
    cache=72 * _MIB, bandwidth=1.008e12, half=165.2e12, single=82.6e12,
)  # fmt: skip
_H100 = Chip(
    "h100", "sm_90", processors=132, shared=227 * _KIB, processor_shared=228 * _KIB, registers=65536, warps=64,
    cache=50_000_000, async_products=True, bandwidth=3.35e12, half=989e12, single=67e12,
)  # fmt: skip
_B200 = Chip(
    "b200", "sm_100", processors=148, shared=227 * _KIB, processor_shared=228 * _KIB, registers=65536, warps=64,
    cache=126_000_000, async_products=True, bandwidth=8.0e12, half=2250e12, single=75e12,
)  # fmt: skip
_B300 = replace(_B200, name="b300", capability="sm_103")
_RTX_5090 = Chip(
    "rtx-5090", "sm_120", processors=170, shared=99 * _KIB, processor_shared=100 * _KIB, registers=65536, warps=48,
    cache=96 * _MIB, bandwidth=1.792e12, half=209.5e12, single=104.8e12,
)  # fmt: skip
# No data sheet gives GB10's rate of bfloat16: this is the highest one that was measured (mmapeak). That of float32 is
# from NVIDIA's talk at Hot Chips 2025.
_GB10 = replace(
    _RTX_5090, name="gb10", capability="sm_121", processors=48, cache=24 * _MIB, bandwidth=273e9, half=213e12,
    single=31e12,
)  # fmt: skip
_MI300X = Chip(
    "mi300x", "gfx942", processors=304, shared=64 * _KIB, processor_shared=64 * _KIB, registers=512, warps=32,
    cache=256_000_000, bandwidth=5.3e12, half=1307e12, single=163e12,
)  # fmt: skip

#: name -> chip. The first one of a capability is the one that launch configurations are chosen for.
CHIPS = {
    chip.name: chip
    for chip in (
        _A100,
        _A10,
        replace(_A10, name="rtx-3090", processors=82, bandwidth=936e9, half=71e12, single=35.6e12),
        _RTX_4090,
        replace(_RTX_4090, name="l4", processors=58, cache=48 * _MIB, bandwidth=300e9, half=121e12, single=30.3e12),
        replace(_RTX_4090, name="l40s", processors=142, cache=96 * _MIB, bandwidth=864e9, half=362e12, single=91.6e12),
        _H100,
        replace(_H100, name="h200", bandwidth=4.8e12),
        _B200,
        _B300,
        replace(_B300, name="gb300", processors=152, half=2500e12, single=80e12),
        _RTX_5090,
        replace(_RTX_5090, name="rtx-pro-6000", processors=188, cache=128 * _MIB, half=503.8e12, single=125e12),
        _GB10,
        _MI300X,
    )
}

#: The architectures of all chips, each once.
CAPABILITIES = tuple(dict.fromkeys(chip.capability for chip in CHIPS.values()))
#: What a GPU that is not known is taken for where nothing nearer is.
SMALL = Chip(
    "small", "", processors=64, shared=64 * _KIB, processor_shared=64 * _KIB, registers=65536, warps=32,
    cache=4_000_000,
)  # fmt: skip

# Words that tell another product, with other counts or rates, from the one whose words it has ("NVIDIA H100 PCIe").
_OTHER_PRODUCTS = {"40gb", "d", "laptop", "max", "mig", "nvl", "pcie", "server", "super", "ti"}


@functools.cache
def chip_of_capability(capability: str) -> Chip:
    """The chip whose limits hold for a GPU of `capability`, a compiler's name such as "sm_89" or "gfx942".

    The first one listed of that capability. For one of NVIDIA's that is not listed, the chip of the nearest lower one
    that is; :data:`SMALL` where there is none, and for other makers' GPUs.
    """
    number = _sm_number(capability)
    if not number:
        return next((chip for chip in CHIPS.values() if chip.capability == capability), SMALL)
    lower = [chip for chip in CHIPS.values() if 0 < _sm_number(chip.capability) <= number]
    return max(lower, key=lambda chip: _sm_number(chip.capability), default=SMALL)


def chip_of_device(device_name: str) -> Chip | None:
    """The product by the name that a GPU's driver gives ("NVIDIA H200"); None for one that is not listed."""
    words = set(device_name.lower().replace("-", " ").split())
    if words & _OTHER_PRODUCTS:
        return None
    return next((chip for chip in CHIPS.values() if words.issuperset(chip.name.split("-"))), None)
