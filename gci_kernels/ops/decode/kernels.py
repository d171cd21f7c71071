"""The GPU kernels of a decoding step, as the registry knows them."""

from gci_kernels.hardware import Kernel, register
from gci_kernels.ops.decode import checks

_FILES = ("ops/decode/cuda.py", "ops/decode/group.py")

register(Kernel("decode_step", _FILES, checks.check_step, language="cuda"))
register(Kernel("decode_attend", _FILES, checks.check_attend, language="cuda", needs=("decode_step",)))
