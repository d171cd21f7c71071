"""row_linear's GPU kernel, as the registry knows it."""

from functools import partial

import torch

from gci_kernels.hardware import Kernel, LaunchConfig, Shape, register
from gci_kernels.hardware.stages import Operands, Results, Stage, drawing_on
from gci_kernels.impl import implementation
from gci_kernels.ops import launching
from gci_kernels.ops.row_linear import aten, checks
from gci_kernels.ops.row_linear.config import choose_row_linear_config

# Name -> module, form, and which operand is W: "aten" copies the rows into a copy of W, "kept" takes such a copy.
_FORMS = {
    "aten": ("aten", "merge", "weight"), "kept": ("aten", "kept", "merged"), "triton": ("triton", "triton", "weight")
}  # fmt: skip


def stages(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Stage]:
    """For timing: y and dX of a layer with trained rows; none where there are no such rows."""
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
        name: Stage(operands, {impl: partial(run, *form) for impl, form in _FORMS.items()})
        for name, run in (("forward", _y), ("backward: dX", _dx))
    }


def _y(impl: str, form: str, w: str, t: Operands, dtype: torch.dtype) -> Results:
    forward = implementation("row_linear", impl).forward
    return (forward(t["x"], t[w], None, t["active"], t["positions"], form),)


def _dx(impl: str, form: str, w: str, t: Operands, dtype: torch.dtype) -> Results:
    dx = implementation("row_linear", impl).dx
    return (dx(t["dy"], t[w], t["active"], t["positions"], t["chosen"], form),)


register(Kernel(
    "row_linear", ("ops/row_linear/triton.py", "ops/row_linear/config.py", *launching.FILES, "hardware/tuned.py"),
    checks.check, stages=stages,
    launches=(LaunchConfig(
        "row_linear", launching.ProductConfig, choose_row_linear_config, launching.PRODUCT_CANDIDATES
    ),),
))  # fmt: skip
