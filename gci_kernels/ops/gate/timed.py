"""The stages by which the gate's GPU kernel is timed; names are those of bench/costs.py."""

import torch

from gci_kernels.hardware import Shape
from gci_kernels.hardware.stages import Stage, drawing_on, make_stages


def stages(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Stage]:
    """Forward and backward of a layer with experts, from float32 sums; none where there are no experts."""
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
