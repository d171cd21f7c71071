"""The gate's GPU kernel, as the registry knows it."""

from gci_kernels.hardware import Kernel, LaunchConfig, register
from gci_kernels.ops import launching
from gci_kernels.ops.gate import checks, timed
from gci_kernels.ops.gate.config import GateConfig, choose_gate_config

register(Kernel(
    "gate", ("ops/gate/triton.py", "ops/gate/config.py", "limits.py", *launching.FILES), checks.check,
    launches=(LaunchConfig("gate", GateConfig, choose_gate_config),), stages=timed.stages,
))  # fmt: skip
