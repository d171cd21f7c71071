"""The check of the gate's GPU kernel: forward and backward against aten.py in float64."""

import torch
from torch import Tensor

from gci_kernels.hardware import Comparison, Shape
from gci_kernels.hardware.self_check import compare, drawing
from gci_kernels.impl import implementation


def check(shape: Shape, dtype: torch.dtype, device: torch.device) -> Comparison:
    """`projected` and du as `project` leaves them: float32 from the kernels, `dtype` from the library."""
    draw, hidden = drawing(shape, device), shape.rank + shape.experts
    projected, du = (draw(shape.tokens, columns, torch.float32) for columns in (hidden, shape.rank))
    with_nan = projected.clone()
    with_nan[::3, -1] = float("nan")  # the last expert's logit
    inputs = {
        "projected": projected, "projected of rounded": projected.to(dtype), "du": du, "du of rounded": du.to(dtype),
        "dgates": draw(shape.tokens, shape.experts, torch.float32), "with NaN": with_nan,
    }  # fmt: skip

    def outputs(impl: str, t: dict[str, Tensor]) -> dict[str, Tensor]:
        module = implementation("gate", impl)
        options, results = (shape.experts, shape.top_k, 2.0, t["du of rounded"].dtype), dict[str, Tensor]()
        for name in ("", " of rounded"):
            projected, du = t["projected" + name], t["du" + name]
            u, gates = module.forward(projected, *options)
            dprojected, recomputed = module.backward(du, t["dgates"], projected, *options)
            alone, _ = module.backward(du, None, projected, *options)
            made = {
                "u": u, "gates": gates, "dprojected": dprojected, "u in backward": recomputed, "dh, no dgates": alone,
            }  # fmt: skip
            results |= {output + name: value for output, value in made.items()}
        results["NaN gates"] = module.forward(t["with NaN"], *options)[1].isnan().float()
        return results

    return compare(outputs, "triton", "aten", inputs)
