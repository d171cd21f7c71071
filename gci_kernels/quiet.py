"""Silence for other packages' notices in a command of ours, set as this module is imported: before all of them.

transformers and PEFT import what they find, torchao and bitsandbytes for example, and these tell of libraries that they
miss, of what torch will change and the like: nothing that the command's user can do anything about. GCI_DEBUG=1 leaves
all as it is. Where gci_kernels is a library in somebody else's program, nothing is changed.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path


def is_command(argv0: str, original: Sequence[str]) -> bool:
    """Whether this process is `gci-kernels` or `python -m gci_kernels`.

    Args:
        argv0: sys.argv[0], "-m" while Python looks for the module to run.
        original: sys.orig_argv.
    """
    if argv0 != "-m":
        return Path(argv0).stem == "gci-kernels"
    module = list(original)[list(original).index("-m") + 1]
    return module == "gci_kernels" or module.startswith("gci_kernels.")


def silence() -> None:
    """No logged notice below an error, no warning but our own, which all begin with our name; no tqdm bars."""
    logging.disable(logging.WARNING)
    os.environ.setdefault("TQDM_DISABLE", "1")
    if not sys.warnoptions:  # else the user has said which warnings to show
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", message="gci_kernels")


if is_command(sys.argv[0] if sys.argv else "", sys.orig_argv) and os.environ.get("GCI_DEBUG") != "1":
    silence()
