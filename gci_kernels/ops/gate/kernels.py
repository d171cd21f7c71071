"""The gate's GPU kernel, as the registry knows it."""

import torch

from gci_kernels.hardware import Kernel, LaunchConfig, Shape, register
from gci_kernels.hardware.stages import Stage, drawing_on, make_stages
from gci_kernels.ops import launching
from gci_kernels.ops.gate import checks
from gci_kernels.ops.gate.config import GateConfig, choose_gate_config


def stages(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Stage]:
    """For timing: forward and backward of a layer with experts, from float32 sums; none where there are no experts."""
    if not shape.experts:
        return {}
    options, draw = (shape.experts, shape.top_k, 2.0), drawing_on(device)
    operands = {
        "projected": draw(shape.tokens, shape.rank + shape.experts, torch.float32),
        "du": draw(shape.tokens, shape.rank, torch.float32),
    }
    return make_stages("gate", operands, {
        "forward: mix": lambda module, t, dtype: module.forward(t["projected"], *options, dtype),
        "backward: mix": lambda module, t, dtype: module.backward(t["du"], None, t["projected"], *options, dtype),
    })  # fmt: skip


register(Kernel(
    "gate", ("ops/gate/triton.py", "ops/gate/config.py", "limits.py", *launching.FILES), checks.check,
    launches=(LaunchConfig("gate", GateConfig, choose_gate_config),), stages=stages,
))  # fmt: skip
