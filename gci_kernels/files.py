"""The cache folder, for fetched models and records of which kernels passed their check here; writing of results."""

import os
import tempfile
from pathlib import Path


class CacheError(OSError):
    """Something could not be stored in the cache folder. The message is one line that says why and what to do."""


def cache_dir() -> Path:
    """The cache folder: $GCI_CACHE, else gci_kernels in $XDG_CACHE_HOME or ~/.cache. It may not exist yet."""
    if "GCI_CACHE" in os.environ:
        return Path(os.environ["GCI_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gci_kernels")


def make_cache_dir() -> Path:
    """The cache folder, created where it is missing and checked to be writable.

    Raises:
        CacheError: it cannot be created, or nothing can be written there.
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
    """The CacheError for an `error` that was raised by work in the cache folder."""
    return CacheError(
        f"the cache folder {cache_dir()} cannot be used: {error.strerror or error}; GCI_CACHE=FOLDER names another one"
    )


def check_output(path: Path) -> None:
    """Checks, before the work, that its result can be written to `path`.

    Raises:
        ValueError: `path` is a folder, or the folder that it lies in is missing or not writable.
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
    """Writes a file atomically: readers see the old or the new text, and a failure leaves the old one.

    Raises:
        OSError: it cannot be written.
    """
    scratch = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        scratch.write_bytes(text.encode())  # UTF-8 and line feeds on every system
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
