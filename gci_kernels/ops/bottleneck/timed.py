"""The stages by which the bottleneck's GPU kernels are timed, with operands of the sizes that a training step has."""

from types import ModuleType

import torch

from gci_kernels.hardware import Shape
from gci_kernels.hardware.stages import Operands, Results, Run, Stage, drawing_on, make_stages
from gci_kernels.ops.bottleneck.checks import make_operands


def _du_db(module: ModuleType, t: Operands, dtype: torch.dtype) -> Results:
    """By one reading of dY where there is a kernel for it."""
    if hasattr(module, "one_reading") and module.one_reading(t["dy"], t["B"].shape[1]):
        return module.project_reduce(t["dy"], t["B"], t["u"])
    return module.project(t["dy"], t["B"]), module.reduce(t["u"], t["dy"])


#: kernel -> its stages; their names are those of bench/costs.py, where it counts the stage.
_STAGES: dict[str, dict[str, Run]] = {
    "project": {"forward: project": lambda module, t, _: (module.project(t["x"], t["stack"].t()),)},
    "expand": {
        "forward: expand": lambda module, t, _: (module.expand(t["u"], t["B"].t(), t["x"], t["weight"].t(), None),),
        "backward: dX": lambda module, t, _: (module.expand(t["dprojected"], t["stack"], t["dy"], t["weight"], None),),
    },
    "reduce": {
        "backward: dU, dB": _du_db,
        "backward: dA": lambda module, t, _: (module.reduce(t["dprojected"], t["x"]),),
    },
    "dropout": {"dropout": lambda module, t, _: (module.dropout(t["x"], 0.05, 12345),)},
}


def stages(kernel: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Stage]:
    """The stages of a kernel, a key of the registry; none for a layer without adapter columns.

    The adapter's weights are of `dtype`, as activations are. Dropout is the same with experts, and left out there.
    """
    if not shape.rank or kernel == "dropout" and shape.experts:
        return {}
    return make_stages("bottleneck", make_operands(drawing_on(device), shape, dtype, dtype), _STAGES[kernel])
