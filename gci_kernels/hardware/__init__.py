"""The GPU kernels there are, and which of them are proved on which GPU. Nothing here imports an op.

kernels.py is the registry, in which each op declares its kernels; proving.py says what "auto" may take; records.py
keeps what is proved and timed; self_check.py checks a kernel that has no record; timing.py times it, by the stages of
stages.py; gpus.py and chips.py know GPUs; tuned.py keeps launch configurations that tuning found.
"""

from gci_kernels.hardware.kernels import KERNELS, Comparison, Kernel, LaunchConfig, Shape, get, names, register
from gci_kernels.hardware.proving import proves, recorded, renew, renew_all, settled, start, state, takes
from gci_kernels.hardware.records import (
    Record,
    compiler,
    counting,
    digest,
    find,
    keep,
    make_record,
    missing,
    own,
    own_path,
    shipped,
    shipped_folder,
)

__all__ = [
    "KERNELS", "Comparison", "Kernel", "LaunchConfig", "Record", "Shape", "compiler", "counting", "digest", "find",
    "get", "keep", "make_record", "missing", "names", "own", "own_path", "proves", "recorded", "register", "renew",
    "renew_all", "settled", "shipped", "shipped_folder", "start", "state", "takes",
]  # fmt: skip
