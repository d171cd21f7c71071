"""The attention's GPU kernels, as the registry knows them."""

from gci_kernels.hardware import Kernel, LaunchConfig, register
from gci_kernels.ops import launching
from gci_kernels.ops.attention import checks
from gci_kernels.ops.attention.config import AttentionConfig, choose_attention_config

register(Kernel(
    "attention", ("ops/attention/triton.py", "ops/attention/config.py", "limits.py", *launching.FILES), checks.check,
    launches=(LaunchConfig("attention", AttentionConfig, choose_attention_config),),
))  # fmt: skip
