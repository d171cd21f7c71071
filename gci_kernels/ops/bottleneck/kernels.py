"""The bottleneck's GPU kernels, as the registry knows them."""

from dataclasses import replace
from functools import partial

from gci_kernels.hardware import Kernel, LaunchConfig, register
from gci_kernels.ops import launching
from gci_kernels.ops.bottleneck import checks, config, timed

_FOLDER = "ops/bottleneck/triton/"
_DROPOUT = (_FOLDER + "dropout.py", "ops/bottleneck/philox.py", "ops/bottleneck/config.py", *launching.FILES)
_PRODUCT = (*_DROPOUT, _FOLDER + "partial_sums.py", "hardware/tuned.py")
_BLOCKS_T, _BLOCKS_N, _WARPS = (16, 32, 64, 128, 256), (64, 128, 256, 512), (4, 8)

# What decides most is tried first.
_PROJECT = LaunchConfig(
    "project", config.ProjectConfig, config.choose_project_config,
    dict(block_t=_BLOCKS_T, block_k=(32, 64, 128, 256), num_stages=(2, 3, 4, 5), num_warps=_WARPS),
)  # fmt: skip
_EXPAND = LaunchConfig(
    "expand", config.ExpandConfig, config.choose_expand_config,
    dict(
        block_t=(64, 128, 256), block_n=(64, 128, 256), block_k=(32, 64, 128), num_stages=(2, 3, 4, 5),
        num_warps=_WARPS, group=(4, 8, 16), descriptors=(False, True),
    ),
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

# project_reduce is a launch of reduce, which backward takes in its place: the two are proved together.
for _kernel in (
    Kernel("project", (_FOLDER + "project.py", *_PRODUCT), partial(checks.check, checks.project), (_PROJECT,)),
    Kernel("expand", (_FOLDER + "expand.py", *_PRODUCT), partial(checks.check, checks.expand), (_EXPAND,)),
    Kernel(
        "reduce", (_FOLDER + "reduce.py", _FOLDER + "project_reduce.py", *_PRODUCT),
        partial(checks.check, checks.reduce), (_REDUCE, _PROJECT_REDUCE),
    ),
    Kernel("dropout", _DROPOUT, partial(checks.check, checks.dropout), (_DROPOUT_LAUNCH,)),
):  # fmt: skip
    register(replace(_kernel, stages=partial(timed.stages, _kernel.name)))
