"""The check of the gate's GPU kernel: forward and backward against aten.py in float64."""

import torch
from torch import Tensor

from gci_kernels.hardware import Comparison, Shape
from gci_kernels.hardware.self_check import drawing
from gci_kernels.impl import implementation


def check(shape: Shape, dtype: torch.dtype, device: torch.device) -> Comparison:
    """`projected` and du as `project` leaves them: float32 from the kernels, `dtype` from the library."""
    draw, hidden = drawing(shape, device), shape.rank + shape.experts
    projected, du = (draw(shape.tokens, columns, torch.float32) for columns in (hidden, shape.rank))
    dgates = draw(shape.tokens, shape.experts, torch.float32)
    with_nan = projected.clone()
    with_nan[::3, -1] = float("nan")  # the last expert's logit

    def outputs(impl: str, dtype: torch.dtype, operands: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        module = implementation("gate", impl)
        options, results = (shape.experts, shape.top_k, 2.0, dtype), dict[str, Tensor]()
        for name, (projected, du) in operands.items():
            wide_dgates = dgates.to(torch.promote_types(dtype, torch.float32))
            u, gates = module.forward(projected, *options)
            dprojected, recomputed = module.backward(du, wide_dgates, projected, *options)
            alone, _ = module.backward(du, None, projected, *options)
            made = {
                "u": u, "gates": gates, "dprojected": dprojected, "u in backward": recomputed, "dh, no dgates": alone,
            }  # fmt: skip
            results |= {output + name: value for output, value in made.items()}
        results["NaN gates"] = module.forward(with_nan, *options)[1].isnan().float()
        return results

    operands = {"": (projected, du), " of rounded": (projected.to(dtype), du.to(dtype))}
    wide = {name: (projected.double(), du.double()) for name, (projected, du) in operands.items()}
    return Comparison(
        kernel=lambda: outputs("triton", dtype, operands),
        plain=outputs("aten", dtype, operands),
        truth=outputs("aten", torch.float64, wide),
    )
