"""Which implementation runs each stage of the bottleneck: a pure function of dtype, device and instruction set."""

import torch

from gci_kernels import native
from gci_kernels.impl import Plan, native_obstacle

# Where the skinny kernels beat the library's products, measured at T=2048, 2048x2048, R=40. With AVX-512 they take less
# than half its time in float32. In bfloat16 they are as fast and their float32 sums are not rounded on the way, but
# `expand`, which rounds in the end, is the library's.
_WINS = {
    ("avx512bf16", torch.float32): ("project", "expand", "reduce"),
    ("avx512", torch.float32): ("project", "expand", "reduce"),
    ("avx2", torch.float32): ("project",),
    ("avx512bf16", torch.bfloat16): ("project", "reduce"),
}


def choose_plan(impl: str, *, device_type: str, dtype: torch.dtype, isa: str | None = None) -> Plan:
    """The plan for tensors of `dtype` on `device_type`; `isa` is the CPU's instruction set (None: this machine's).

    Raises ValueError where impl="native" is asked for and cannot run.
    """
    obstacle = native_obstacle(device_type, dtype)
    if impl == "native" and obstacle:
        raise ValueError(f"impl='native' cannot run here: {obstacle}")
    if impl == "aten" or obstacle:
        return Plan(project="aten", mix="aten", expand="aten", reduce="aten", dropout="aten")
    isa = native.ISA if isa is None else isa
    wins = _WINS.get((isa, dtype), ())
    stages = {name: "native" if name in wins else "aten" for name in ("project", "expand", "reduce")}
    return Plan(**stages, mix="native", dropout="native")
