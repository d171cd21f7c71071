"""Silences other packages' notices in our commands. Importing this module does it, so it is imported before them.

transformers and PEFT import what is installed, torchao and bitsandbytes for example, which log missing libraries,
deprecations in torch and the like: nothing that the command's user can change. GCI_DEBUG=1 keeps the notices. Where
gci_kernels is a library in another program, nothing is changed.
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
    """Turns off log messages below an error, warnings but our own, which all begin with our name, and tqdm's bars."""
    logging.disable(logging.WARNING)
    os.environ.setdefault("TQDM_DISABLE", "1")
    if not sys.warnoptions:  # else the user has chosen which warnings to show
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", message="gci_kernels")


if is_command(sys.argv[0] if sys.argv else "", sys.orig_argv) and os.environ.get("GCI_DEBUG") != "1":
    silence()
