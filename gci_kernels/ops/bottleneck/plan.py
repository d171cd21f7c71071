"""Which implementation runs each stage of the bottleneck: a pure function of tokens, dtype, device, instruction set."""

import torch

from gci_kernels import native
from gci_kernels.impl import Plan, native_obstacle, triton_obstacle

_ANY = 2**62
# The numbers of tokens, from and to, at which a skinny kernel beats the library's product; measured with 2 threads at
# 2048x2048 and 576x1536, R = 40. In float32 with AVX-512 the kernels take half the library's time or less, but packing
# the small operand is too much for a few tokens; `expand` belongs to the library, which hides it in the base product.
# In bfloat16 they are as fast as the library and leave their sums unrounded, which `expand` rounds either way.
_WINS = {
    ("avx512bf16", torch.float32): {"project": (64, _ANY), "reduce": (64, _ANY)},
    ("avx512", torch.float32): {"project": (64, _ANY), "reduce": (64, _ANY)},
    ("avx2", torch.float32): {"project": (64, _ANY)},
    ("avx512bf16", torch.bfloat16): {"project": (0, _ANY), "expand": (0, 32), "reduce": (0, _ANY)},
}


def choose_plan(impl: str, *, tokens: int, dtype: torch.dtype, device_type: str, isa: str | None = None) -> Plan:
    """The plan for x [tokens, in] of `dtype` on `device_type`; `isa`: the CPU's instruction set, None for this one's.

    "native" takes every C++ kernel that there is for `dtype`, "auto" those that are no slower than the library. The
    Triton kernels have not run on real hardware yet: "auto" leaves them out until they have, "triton" takes them.
    Raises ValueError where an implementation is asked for and cannot run.
    """
    if impl == "triton":
        obstacle = triton_obstacle(device_type, dtype)
    else:
        obstacle = native_obstacle(device_type, dtype)
    if impl in ("native", "triton") and obstacle:
        raise ValueError(f"impl={impl!r} cannot run here: {obstacle}")
    if impl == "triton":
        return Plan(project=impl, mix=impl, expand=impl, reduce=impl, dropout=impl)
    if impl == "aten" or obstacle:
        return Plan(project="aten", mix="aten", expand="aten", reduce="aten", dropout="aten")
    isa = native.ISA if isa is None else isa
    wins = _WINS.get((isa, dtype), {})
    half = dtype == torch.bfloat16 and isa == "avx512bf16"
    exist = {"project", "expand", "reduce"} if half else {"project", "reduce"} if dtype == torch.float32 else set()

    def choice(stage: str) -> str:
        low, high = wins.get(stage, (1, 0))
        return "native" if stage in exist and (impl == "native" or low <= tokens <= high) else "aten"

    return Plan(
        project=choice("project"), mix="native", expand=choice("expand"), reduce=choice("reduce"), dropout="native"
    )
