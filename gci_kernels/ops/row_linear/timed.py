"""The stages by which row_linear's GPU kernel is timed; names are those of bench/costs.py."""

from functools import partial
from types import ModuleType

import torch

from gci_kernels.hardware import Shape
from gci_kernels.hardware.stages import Operands, Results, Stage, drawing_on
from gci_kernels.impl import implementation
from gci_kernels.ops.row_linear import aten

#: implementation -> form, and which operand is W: "aten" copies the rows into a copy of W, "kept" takes such a copy.
_FORMS = {"aten": ("merge", "weight"), "kept": ("kept", "merged"), "triton": ("triton", "weight")}


def stages(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Stage]:
    """y and dX of a layer with trained rows; none where there are no such rows."""
    if not shape.rows:
        return {}
    draw, std = drawing_on(device), shape.depth**-0.5
    positions = torch.randperm(shape.width, device=device)[: shape.rows]
    weight, active = draw(shape.width, shape.depth, dtype, std), draw(shape.rows, shape.depth, dtype, std)
    dy = draw(shape.tokens, shape.width, dtype)
    operands = {
        "x": draw(shape.tokens, shape.depth, dtype), "dy": dy, "weight": weight, "active": active,
        "positions": positions, "merged": aten.merge(weight, active, positions),
        "chosen": dy.index_select(1, positions),
    }  # fmt: skip
    return {
        name: Stage(operands, {impl: partial(run, form, w) for impl, (form, w) in _FORMS.items()})
        for name, run in (("forward", _y), ("backward: dX", _dx))
    }


def _module(form: str) -> ModuleType:
    return implementation("row_linear", "triton" if form == "triton" else "aten")


def _y(form: str, w: str, t: Operands, dtype: torch.dtype) -> Results:
    return (_module(form).forward(t["x"], t[w], None, t["active"], t["positions"], form),)


def _dx(form: str, w: str, t: Operands, dtype: torch.dtype) -> Results:
    return (_module(form).dx(t["dy"], t[w], t["active"], t["positions"], t["chosen"], form),)
