"""The bottleneck's GPU kernels, as the registry knows them."""

from functools import partial
from types import ModuleType

import torch

from gci_kernels.hardware import Kernel, LaunchConfig, Shape, register
from gci_kernels.hardware.stages import Operands, Results, Run, Stage, drawing_on, make_stages
from gci_kernels.ops import launching
from gci_kernels.ops.bottleneck import checks, config

_FOLDER = "ops/bottleneck/triton/"
_DROPOUT = (_FOLDER + "dropout.py", "ops/bottleneck/philox.py", "ops/bottleneck/config.py", *launching.FILES)
_PRODUCT = (*_DROPOUT, _FOLDER + "partial_sums.py", "hardware/tuned.py")
_BLOCKS_T, _BLOCKS_N, _WARPS = (16, 32, 64, 128, 256), (64, 128, 256, 512), (4, 8)

# The most important field is tried first.
_PROJECT = LaunchConfig(
    "project", config.ProjectConfig, config.choose_project_config,
    dict(block_t=_BLOCKS_T, block_k=(32, 64, 128, 256), num_stages=(2, 3, 4, 5), num_warps=_WARPS),
)  # fmt: skip
_EXPAND = LaunchConfig(
    "expand", config.ExpandConfig, config.choose_expand_config,
    dict(launching.PRODUCT_CANDIDATES, descriptors=(False, True)),
)  # fmt: skip
_REDUCE = LaunchConfig(
    "reduce", config.ReduceConfig, config.choose_reduce_config,
    dict(block_n=_BLOCKS_N, block_t=(16, 32, 64, 128), num_stages=(2, 3, 4), num_warps=_WARPS),
)  # fmt: skip
_PROJECT_REDUCE = LaunchConfig(
    "project_reduce", config.ReduceConfig, config.choose_project_reduce_config,
    dict(block_n=_BLOCKS_N, block_t=(16, 32, 64, 128), num_stages=(2, 3), num_warps=_WARPS),
)  # fmt: skip
_DROPOUT_LAUNCH = LaunchConfig("dropout", config.DropoutConfig, config.choose_dropout_config)


def _du_db(module: ModuleType, t: Operands, dtype: torch.dtype) -> Results:
    """By one reading of dY where there is a kernel for it."""
    if hasattr(module, "one_reading") and module.one_reading(t["dy"], t["B"].shape[1]):
        return module.project_reduce(t["dy"], t["B"], t["u"])
    return module.project(t["dy"], t["B"]), module.reduce(t["u"], t["dy"])


# Kernel -> the stages by which it is timed; their names are those of bench/costs.py, where it counts the stage.
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


def _stages(kernel: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Stage]:
    """The stages of a kernel, a key of the registry; none for a layer without adapter columns.

    The adapter's weights are of `dtype`, as activations are. Dropout is the same with experts, and left out there.
    """
    if not shape.rank or kernel == "dropout" and shape.experts:
        return {}
    return make_stages("bottleneck", checks.make_operands(drawing_on(device), shape, dtype, dtype), _STAGES[kernel])


def _register(name: str, files: tuple[str, ...], check: checks.Stage, *launches: LaunchConfig) -> None:
    # Dropout by itself is one kernel; of the products, each has a variant with the mask inside.
    masked = None if name == "dropout" else partial(checks.check, check, True)
    register(Kernel(
        name, files, partial(checks.check, check, False), launches, stages=partial(_stages, name), check_dropout=masked
    ))  # fmt: skip


_register("project", (_FOLDER + "project.py", *_PRODUCT), checks.project, _PROJECT)
_EXPAND_FILES = (_FOLDER + "expand.py", _FOLDER + "expand_persistent.py", _FOLDER + "tiles.py", *_PRODUCT)
_register("expand", _EXPAND_FILES, checks.expand, _EXPAND)
# project_reduce is a launch of reduce, which backward takes in its place: the two are proved together.
_REDUCE_FILES = (_FOLDER + "reduce.py", _FOLDER + "project_reduce.py", *_PRODUCT)
_register("reduce", _REDUCE_FILES, checks.reduce, _REDUCE, _PROJECT_REDUCE)
_register("dropout", _DROPOUT, checks.dropout, _DROPOUT_LAUNCH)
