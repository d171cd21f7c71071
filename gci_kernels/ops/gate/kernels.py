"""The gate's GPU kernel, as the registry knows it."""

from gci_kernels.hardware import Kernel, LaunchConfig, register
from gci_kernels.ops.gate import checks, timed
from gci_kernels.ops.triton_config import GateConfig, choose_gate_config

register(
    Kernel(
        name="gate",
        files=("ops/gate/triton.py", "ops/triton_config.py"),
        check=checks.check,
        launches=(LaunchConfig("gate", GateConfig, choose_gate_config),),
        stages=timed.stages,
    )
)
