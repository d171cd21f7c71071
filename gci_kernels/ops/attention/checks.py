"""The check of the attention's Triton kernels: forward and backward against aten.py in float64."""

import torch
from torch import Tensor

from gci_kernels.hardware import Comparison, Shape
from gci_kernels.hardware.self_check import compare, drawing
from gci_kernels.impl import implementation

_HEADS, _RANK = 4, 16


def check(shape: Shape, dtype: torch.dtype, device: torch.device) -> Comparison:
    """Four heads of four columns of wider rows: one sequence, packed ones behind padding, and queries behind a past."""
    draw, tokens = drawing(shape, device), shape.tokens
    inputs = {"qkv": draw(tokens, 3 * _RANK, dtype), "do": draw(tokens, _RANK, dtype)}
    segments = (torch.arange(tokens, dtype=torch.int32, device=device) // max(tokens // 3, 1))[None]
    segments[:, :5] = -1

    def outputs(impl: str, t: dict[str, Tensor]) -> dict[str, Tensor]:
        module = implementation("attention", impl)
        q, k, v = t["qkv"][None].split(_RANK, dim=2)
        results: dict[str, Tensor] = {}
        for name, first, ids in (("", 0, None), (", packed", 0, segments), (", past", tokens // 2, None)):
            o, lse = module.forward(q[:, first:], k, v, _HEADS, ids)
            dq, dk, dv = module.backward(t["do"][None, first:], q[:, first:], k, v, o, lse, _HEADS, ids)
            made = {"o": o, "sums": lse.nan_to_num(neginf=0.0), "dq": dq, "dk": dk, "dv": dv}
            results |= {output + name: value for output, value in made.items()}
        return results

    return compare(outputs, "triton", "aten", inputs)
