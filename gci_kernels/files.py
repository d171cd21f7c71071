"""Files that are kept: the folder for what is made once (fetched models, which kernels have proved themselves here),
and how results are written."""

import os
import tempfile
from pathlib import Path


class CacheError(OSError):
    """Something could not be kept in the cache folder. The message is one line that says why and what to do."""


def cache_dir() -> Path:
    """$GCI_CACHE, else gci_kernels in $XDG_CACHE_HOME or ~/.cache. It may not exist yet."""
    if "GCI_CACHE" in os.environ:
        return Path(os.environ["GCI_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gci_kernels")


def make_cache_dir() -> Path:
    """The cache folder, made where it is missing and known to be writable: for work whose result is kept in it.

    Raises:
        CacheError: it can't be made, or nothing can be written there.
    """
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cache_error(error) from error
    return folder


def cache_error(error: OSError) -> CacheError:
    """What `error`, met in the cache folder, means for the one who runs the command."""
    return CacheError(
        f"the cache folder {cache_dir()} cannot be used: {error.strerror or error}; GCI_CACHE=FOLDER names another one"
    )


def check_output(path: Path) -> None:
    """Find out before the work, not after it, that its result can't be written.

    Raises:
        ValueError: there is a folder of this name, or its folder is missing or can't be written.
    """
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{path}: its folder does not exist")
    if path.is_dir():
        raise ValueError(f"{path}: Is a directory")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{path}: its folder cannot be written: {error.strerror}") from error


def write_whole(path: Path, text: str) -> None:
    """Write a file that others see as it was or as it will be, never half of it, and that a failure leaves as it was.

    Raises:
        OSError: it can't be written.
    """
    scratch = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        scratch.write_bytes(text.encode())  # UTF-8 and line feeds on every system
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
