"""The folder for what is made once and kept: fetched models, and which kernels have proved themselves here."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """$GCI_CACHE, else gci_kernels in $XDG_CACHE_HOME or ~/.cache. It may not exist yet."""
    if "GCI_CACHE" in os.environ:
        return Path(os.environ["GCI_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gci_kernels")
