"""The stages by which the gate's GPU kernel is timed; names are those of bench/costs.py."""

from types import ModuleType

import torch

from gci_kernels.hardware import Shape
from gci_kernels.hardware.stages import Operands, Results, Stage, drawing_on, make_stage


def stages(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Stage]:
    """Forward and backward of a layer with experts, from float32 sums; none where there are no experts."""
    if not shape.experts:
        return {}
    options = (shape.experts, shape.top_k, 2.0)

    def forward(module: ModuleType, t: Operands, dtype: torch.dtype) -> Results:
        return tuple(module.forward(t["projected"], *options, dtype))

    def backward(module: ModuleType, t: Operands, dtype: torch.dtype) -> Results:
        return tuple(module.backward(t["du"], None, t["projected"], *options, dtype))

    draw = drawing_on(device)
    operands = {
        "projected": draw(shape.tokens, shape.rank + shape.experts, torch.float32),
        "du": draw(shape.tokens, shape.rank, torch.float32),
    }
    runs = {"forward: mix": forward, "backward: mix": backward}
    return {name: make_stage("gate", operands, run) for name, run in runs.items()}
