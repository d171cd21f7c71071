"""row_linear's GPU kernel, as the registry knows it."""

from gci_kernels.hardware import Kernel, LaunchConfig, register
from gci_kernels.ops import launching
from gci_kernels.ops.row_linear import checks, timed
from gci_kernels.ops.row_linear.config import choose_row_linear_config

register(Kernel(
    "row_linear", ("ops/row_linear/triton.py", "ops/row_linear/config.py", *launching.FILES, "hardware/tuned.py"),
    checks.check, stages=timed.stages,
    launches=(LaunchConfig(
        "row_linear", launching.ProductConfig, choose_row_linear_config,
        dict(
            block_t=(64, 128, 256), block_n=(64, 128, 256), block_k=(32, 64, 128), num_stages=(2, 3, 4, 5),
            num_warps=(4, 8), group=(4, 8, 16),
        ),
    ),),
))  # fmt: skip
