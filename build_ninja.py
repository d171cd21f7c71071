"""Runs compilers for setup.py: one for a probe, many in parallel by ninja, which compiles only what has changed."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NO_NINJA = """
gci_kernels is compiled by ninja, which pip installs for the build. Without build isolation it has to be there already:
pip install ninja
"""


@dataclass(frozen=True)
class Object:
    """One object file, its source, and the command that compiles it."""

    path: str
    source: str
    command: tuple[str, ...]  # g++ or nvcc, with all options except the files


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The finished command with its output; one that cannot be started counts as failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as failure:
        return subprocess.CompletedProcess(command, 127, "", str(failure))


def probe(command: Sequence[str], name: str, text: str) -> subprocess.CompletedProcess[str]:
    """The finished compilation, by `command`, of a source `name` with this text."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, name)
        source.write_text(text)
        return run([*command, str(source), "-o", f"{source}.out"])


def compile_all(objects: Sequence[Object], folder: Path) -> list[str]:
    """Compiles what is older than its source or a header that this includes, and returns the objects' paths.

    The first ones are started first: they should take the longest. There is one process for each core that this process
    may use, or $MAX_JOBS of them. Where a compiler fails, the build ends after the compiler's message.

    Args:
        folder: for ninja's own files; the same in every build, so that it knows what is up to date.
    """
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "build.ninja"
    script.write_text(_script(objects, folder))
    jobs = os.environ.get("MAX_JOBS") or str(_cores())
    if subprocess.run([_ninja(), "-f", str(script), "-j", jobs], stdout=sys.stderr).returncode:
        sys.exit("\ngci_kernels could not be compiled: the compiler's message is above.\n")
    return [made.path for made in objects]


def write_if_changed(path: Path, text: str) -> Path:
    """Writes a file that others are compiled from; one with this text stays untouched, so that they are up to date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def _ninja() -> str:
    """The program of the package ninja, else the one on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = os.path.join(BIN_DIR, "ninja")
    return found or sys.exit(NO_NINJA)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _script(objects: Sequence[Object], folder: Path) -> str:
    commands = {command: f"compile_{index}" for index, command in enumerate(dict.fromkeys(o.command for o in objects))}
    lines = [f"builddir = {_path(str(folder))}"]
    for command, rule in commands.items():
        line = " ".join(word.replace("$", "$$").replace(" ", "\\ ") for word in command)
        lines += [f"rule {rule}", f"  command = {line} -MD -MF $out.d -c $in -o $out"]
        lines += [f"  description = {Path(command[0]).name} $out", "  depfile = $out.d", "  deps = gcc"]
    lines += [f"build {_path(made.path)}: {commands[made.command]} {_path(made.source)}" for made in objects]
    return "\n".join(lines) + "\n"


def _path(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
