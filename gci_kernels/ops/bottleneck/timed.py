"""The stages by which the bottleneck's GPU kernels are timed, with operands of the sizes that a training step has."""

from types import ModuleType

import torch

from gci_kernels.hardware import Shape
from gci_kernels.hardware.stages import Operands, Results, Run, Stage, drawing_on, make_stage


def _project(module: ModuleType, t: Operands, dtype: torch.dtype) -> Results:
    return (module.project(t["x"], t["stack"].t()),)


def _y(module: ModuleType, t: Operands, dtype: torch.dtype) -> Results:
    return (module.expand(t["u"], t["B"].t(), t["x"], t["weight"].t(), None),)


def _dx(module: ModuleType, t: Operands, dtype: torch.dtype) -> Results:
    return (module.expand(t["dprojected"], t["stack"], t["dy"], t["weight"], None),)


def _du_db(module: ModuleType, t: Operands, dtype: torch.dtype) -> Results:
    """By one reading of dY where there is a kernel for it."""
    if hasattr(module, "one_reading") and module.one_reading(t["dy"], t["B"].shape[1]):
        return tuple(module.project_reduce(t["dy"], t["B"], t["u"]))
    return module.project(t["dy"], t["B"]), module.reduce(t["u"], t["dy"])


def _da(module: ModuleType, t: Operands, dtype: torch.dtype) -> Results:
    return (module.reduce(t["dprojected"], t["x"]),)


def _dropout(module: ModuleType, t: Operands, dtype: torch.dtype) -> Results:
    return (module.dropout(t["x"], 0.05, 12345),)


#: kernel -> its stages; their names are those of bench/costs.py, where it counts the stage.
_STAGES: dict[str, dict[str, Run]] = {
    "project": {"forward: project": _project},
    "expand": {"forward: expand": _y, "backward: dX": _dx},
    "reduce": {"backward: dU, dB": _du_db, "backward: dA": _da},
    "dropout": {"dropout": _dropout},
}


def stages(kernel: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Stage]:
    """The stages of a kernel, a key of the registry; none for a layer without adapter columns.

    The adapter's weights are of `dtype`, as activations are. Dropout is the same with experts, and left out there.
    """
    if not shape.rank or kernel == "dropout" and shape.experts:
        return {}
    draw, hidden, std = drawing_on(device), shape.rank + shape.experts, shape.depth**-0.5
    operands = {
        "x": draw(shape.tokens, shape.depth, dtype),
        "dy": draw(shape.tokens, shape.width, dtype),
        "weight": draw(shape.width, shape.depth, dtype, std),
        "stack": draw(hidden, shape.depth, dtype, std),
        "B": draw(shape.width, shape.rank, dtype, 0.02),
        "u": draw(shape.tokens, shape.rank, dtype),
        "dprojected": draw(shape.tokens, hidden, dtype),
    }
    return {name: make_stage("bottleneck", operands, run) for name, run in _STAGES[kernel].items()}
