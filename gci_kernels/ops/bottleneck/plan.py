"""Which implementation runs each stage of the bottleneck: a pure function of dtype, device and instruction set."""

import torch

from gci_kernels import native
from gci_kernels.impl import Plan, native_obstacle


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
    # Measured at T=2048, 2048x2048, R=40: with AVX-512 the skinny kernels take half the library's time, with AVX2 only
    # `project` wins. bfloat16 products stay with the library, which has the processor's bfloat16 instructions.
    wins = {"avx512": ("project", "expand", "reduce"), "avx2": ("project",)}.get(isa, ())
    stage = {
        name: "native" if name in wins and dtype == torch.float32 else "aten"
        for name in ("project", "expand", "reduce")
    }
    return Plan(**stage, mix="native", dropout="native")
