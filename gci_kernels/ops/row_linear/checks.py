"""The check of row_linear's Triton kernel: forward and dX against aten.py in float64."""

import torch
from torch import Tensor

from gci_kernels.hardware import Comparison, Shape
from gci_kernels.hardware.self_check import drawing
from gci_kernels.impl import implementation


def check(shape: Shape, dtype: torch.dtype, device: torch.device) -> Comparison:
    """Some active rows in falling order of their positions, and all of them: W upside down."""
    draw, std, count = drawing(shape, device), shape.depth**-0.5, shape.rank + shape.experts
    inputs = {
        "x": draw(shape.tokens, shape.depth, dtype),
        "dy": draw(shape.tokens, shape.width, dtype),
        "weight": draw(shape.width, shape.depth, dtype, std),
        "bias": draw(1, shape.width, dtype)[0],
        "active": draw(count, shape.depth, torch.float32, std),
    }
    falling = torch.arange(shape.width - 1, -1, -1, device=device)
    some = falling[:: max(shape.width // count, 1)][:count]

    def outputs(impl: str, form: str, t: dict[str, Tensor]) -> dict[str, Tensor]:
        module = implementation("row_linear", impl)
        results: dict[str, Tensor] = {}
        for name, active, positions in (
            (", some", t["active"][: some.shape[0]], some),
            (", all", t["weight"], falling),
        ):
            rows = (t["weight"], active, positions)
            made = {
                "y": module.forward(t["x"], t["weight"], t["bias"], active, positions, form),
                "y, no bias": module.forward(t["x"], t["weight"], None, active, positions, form),
                "dx": module.dx(t["dy"], *rows, t["dy"].index_select(1, positions), form),
            }
            results |= {output + name: value for output, value in made.items()}
        return results

    return Comparison(
        kernel=lambda: outputs("triton", "triton", inputs),
        plain=outputs("aten", "merge", inputs),
        truth=outputs("aten", "merge", {name: t.to(dtype).double() for name, t in inputs.items()}),
    )
