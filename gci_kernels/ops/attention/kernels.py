"""The attention's GPU kernels, as the registry knows them."""

from gci_kernels.hardware import Kernel, LaunchConfig, register
from gci_kernels.ops import launching
from gci_kernels.ops.attention import checks
from gci_kernels.ops.attention.config import AttentionConfig, choose_attention_config

# Not timed: the library's form, a loop over blocks of queries of a dozen launches each, is no alternative to a fused
# kernel. Only for fewer queries than a matrix unit takes is it as good, and needs no proof.
register(Kernel(
    "attention", ("ops/attention/triton.py", "ops/attention/config.py", "limits.py", *launching.FILES), checks.check,
    launches=(LaunchConfig("attention", AttentionConfig, choose_attention_config),), least=16,
))  # fmt: skip
