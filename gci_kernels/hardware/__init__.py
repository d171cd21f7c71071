"""The GPU kernels there are, and which of them are proved on which GPU. Nothing here imports an op.

kernels.py is the registry, in which each op declares its kernels; records.py keeps what is proved; self_check.py checks
a kernel that has no record; stages.py says by what kernels are timed; gpus.py and chips.py know GPUs; tuned.py keeps
launch configurations that tuning found.
"""

from gci_kernels.hardware.kernels import KERNELS, Comparison, Kernel, LaunchConfig, Shape, get, names, register
from gci_kernels.hardware.records import (
    Record,
    compiler,
    digest,
    find,
    keep,
    make_record,
    missing,
    own,
    own_path,
    proves,
    renew,
    renew_all,
    shipped,
    shipped_folder,
    state,
)

__all__ = [
    "KERNELS", "Comparison", "Kernel", "LaunchConfig", "Record", "Shape", "compiler", "digest", "find", "get", "keep",
    "make_record", "missing", "names", "own", "own_path", "proves", "register", "renew", "renew_all", "shipped",
    "shipped_folder", "state",
]  # fmt: skip
