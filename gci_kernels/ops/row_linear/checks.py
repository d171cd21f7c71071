"""The check of row_linear's Triton kernel: forward and dX against aten.py in float64."""

import torch
from torch import Tensor

from gci_kernels.hardware import Comparison, Shape
from gci_kernels.hardware.self_check import compare, drawing
from gci_kernels.impl import implementation


def check(shape: Shape, dtype: torch.dtype, device: torch.device) -> Comparison:
    """Some active rows in falling order of their positions, and all of them: W upside down."""
    draw, std, count = drawing(shape, device), shape.depth**-0.5, shape.rank + shape.experts
    inputs = {
        "x": draw(shape.tokens, shape.depth, dtype), "dy": draw(shape.tokens, shape.width, dtype),
        "weight": draw(shape.width, shape.depth, dtype, std), "bias": draw(1, shape.width, dtype)[0],
        "active": draw(count, shape.depth, torch.float32, std),
    }  # fmt: skip
    falling = torch.arange(shape.width - 1, -1, -1, device=device)
    some = falling[:: max(shape.width // count, 1)][:count]

    def outputs(impl: str, t: dict[str, Tensor]) -> dict[str, Tensor]:
        module, form = implementation("row_linear", impl), {"triton": "triton", "aten": "merge"}[impl]
        results: dict[str, Tensor] = {}
        weight = t["weight"]
        for name, active, positions in ((", some", t["active"][: some.shape[0]], some), (", all", weight, falling)):
            made = {
                "y": module.forward(t["x"], weight, t["bias"], active, positions, form),
                "y, no bias": module.forward(t["x"], weight, None, active, positions, form),
                "dx": module.dx(t["dy"], weight, active, positions, t["dy"].index_select(1, positions), form),
            }
            results |= {output + name: value for output, value in made.items()}
        return results

    return compare(outputs, "triton", "aten", inputs, rounded_to=dtype)
