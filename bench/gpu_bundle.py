"""`python -m bench.gpu --bundle FILE`: all that a rented machine without a network needs, in one archive.

The sources as they are in the checkout, what is new and not ignored included; the extension, compiled here for that
machine's Python and GPU; wheels that it lacks; and README-first.txt, which names the commands to run there.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .fetch import FetchError, pip_download
from .gpu_processes import ROOT
from .machine import commit

#: Bytes that an archive may have.
LIMIT = 60_000_000
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"

README = """gci_kernels at {commit},
for Python {python} and {arch}. Run in this folder; nothing is installed, and no network is needed. OUT is the folder
whose files come back.{compiled}

First, within nine minutes:

    {setup}GCI_COMMIT={commit} python -m bench.gpu --out "$OUT" --records "$OUT/proved"

Then, within nine minutes, on the same machine or another one (EARLIER: the files that came back; what they prove is
not proved again):

    {setup}GCI_COMMIT={commit} python -m bench.gpu --profile --earlier "$EARLIER" --out "$OUT"
"""
_COMPILED = """ The extension is not here: each command compiles it while it does other work, which needs nvcc, g++,
Python's headers, setuptools, pybind11 and ninja."""
_INSTALL = "python -m pip install -q --no-index --no-deps --target packages wheels/*.whl && PYTHONPATH=packages "


class BundleError(ValueError):
    """A bundle that cannot be made; the message says what is missing, or too large."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `--bundle`."""
    group = parser.add_argument_group("packing for a machine without a network")
    group.add_argument("--bundle", type=Path, metavar="FILE", help="pack an archive (.tar.gz) instead")
    group.add_argument("--python", default=_RUNNING, metavar="X.Y", help="of that machine (default: %(default)s)")
    group.add_argument("--arch", default="sm_90a", help="its GPU (default: %(default)s)")
    group.add_argument("--python-headers", type=Path, metavar="FOLDER", help="the folder of that Python's Python.h")
    group.add_argument("--extension", type=Path, metavar="FILE", help="an extension that is built already")
    group.add_argument(
        "--no-extension",
        action="store_true",
        help="leave it out: it is compiled there, while the Triton kernels are checked",
    )
    group.add_argument("--wheels", nargs="+", default=[], metavar="PACKAGE==VERSION", help="what that machine lacks")


def main(args: argparse.Namespace, root: Path = ROOT) -> int:
    """Pack, and print what is in the archive and the commands; 1 with a message where it cannot be made."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            size = pack(args, root, Path(scratch))
    except (BundleError, FetchError) as error:
        print(f"no bundle: {error}", file=sys.stderr)
        return 1
    print(f"{args.bundle}: {size / 1e6:.1f} MB. There: tar -xzf {args.bundle.name}, then see README-first.txt:\n")
    print(_readme(args, root))
    return 0


def pack(args: argparse.Namespace, root: Path, scratch: Path) -> int:
    """Write the archive whole, or not at all; returns its bytes.

    Raises:
        BundleError: something is missing, or the archive would be larger than LIMIT.
        FetchError: a wheel could not be fetched.
    """
    files = {name: root / name for name in sources(root)}
    if not args.no_extension:
        files[f"gci_kernels/_native{suffix(args.python)}"] = _extension(args, scratch)
    for wheel in fetch_wheels(args.wheels, args.python, scratch):
        files[f"wheels/{wheel.name}"] = wheel
    (scratch / "README-first.txt").write_text(_readme(args, root))
    files["README-first.txt"] = scratch / "README-first.txt"
    made, folder = scratch / "bundle.tar.gz", f"gci_kernels-{_sha(root)[:10]}"
    with tarfile.open(made, "w:gz") as archive:
        for name, path in files.items():
            archive.add(path, f"{folder}/{name}", recursive=False)
    size = made.stat().st_size
    if size > LIMIT:
        largest = sorted(files, key=lambda name: files[name].stat().st_size, reverse=True)[:5]
        named = ", ".join(f"{name} {files[name].stat().st_size / 1e6:.1f} MB" for name in largest)
        raise BundleError(f"{size / 1e6:.1f} MB are more than {LIMIT / 1e6:.0f} MB; the largest parts: {named}")
    args.bundle.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(made, args.bundle)
    return size


def _sha(root: Path) -> str:
    """The commit, and that files were changed since."""
    found = commit(root)
    return "unknown" if found is None else found["sha"] + ("-changed" if found["changed"] else "")


def _readme(args: argparse.Namespace, root: Path) -> str:
    setup, compiled = _INSTALL if args.wheels else "", _COMPILED if args.no_extension else ""
    return README.format(commit=_sha(root), python=args.python, arch=args.arch, setup=setup, compiled=compiled)


def sources(root: Path) -> list[str]:
    """The files that git knows in the checkout `root`, and those that it would add.

    Raises:
        BundleError: it is no checkout.
    """
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BundleError(f"{root} is no checkout of git: {done.stderr.strip()}")
    # A file that was deleted and not yet committed is still known.
    return [name for name in done.stdout.split("\0") if name and (root / name).is_file()]


# The extension for another machine


def suffix(python: str) -> str:
    """What the name of an extension ends with that Python `python` ("3.12") loads: this one, or one on x86-64 Linux."""
    if python == _RUNNING:
        return str(sysconfig.get_config_var("EXT_SUFFIX"))
    return f".cpython-{python.replace('.', '')}-x86_64-linux-gnu.so"


def _extension(args: argparse.Namespace, scratch: Path) -> Path:
    """The one that is named, or a new one."""
    named, name = args.extension, f"_native{suffix(args.python)}"
    if named is None:
        return build(args, scratch)
    if not named.is_file():
        raise BundleError(f"--extension {named}: there is no such file")
    if named.name != name:
        raise BundleError(f"--extension {named}: Python {args.python} loads {name}")
    return named


def build(args: argparse.Namespace, scratch: Path) -> Path:
    """Compile csrc for the Python and the GPU that are named; the extension's path.

    This Python's setuptools and pybind11 do it, with the other Python's headers before its own.

    Raises:
        BundleError: headers are missing, or a compiler failed.
    """
    environment = os.environ | {"GCI_BUILD_CUDA": "1", "GCI_CUDA_ARCH_LIST": capability(args.arch)}
    if args.python != _RUNNING:
        flags = f"-I{headers(args.python, args.python_headers)} {os.environ.get('CPPFLAGS', '')}"
        environment |= {"CPPFLAGS": flags.strip(), "SETUPTOOLS_EXT_SUFFIX": suffix(args.python)}
    made = scratch / "built"
    options = ["--build-lib", str(made), "--build-temp", str(scratch / "objects")]
    command = [sys.executable, "setup.py", "-q", "build_ext", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = " | ".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise BundleError(f"csrc was not built: {last}")
    return made / "gci_kernels" / f"_native{suffix(args.python)}"


def capability(arch: str) -> str:
    """nvcc's name of an architecture as GCI_CUDA_ARCH_LIST has it: "9.0a" for "sm_90a"."""
    found = re.fullmatch(r"sm_(\d+)(\d)([a-z]?)", arch)
    if found is None:
        raise BundleError(f"--arch {arch}: it is named like sm_90a")
    return f"{found[1]}.{found[2]}{found[3]}"


def headers(python: str, named: Path | None) -> Path:
    """The folder with Python.h of that version: the one that is named, else that of an interpreter in PATH.

    Raises:
        BundleError: there is none, or it is of another version.
    """
    folder = named or _installed_headers(python)
    if folder is None:
        raise BundleError(
            f"the extension for Python {python} needs its headers: there is no python{python} in PATH that has them. "
            "Install it with its headers, name their folder by --python-headers, or a built extension by --extension, "
            "or leave it out by --no-extension"
        )
    version = folder / "patchlevel.h"
    if not (folder / "Python.h").exists() or not (folder / "pyconfig.h").exists() or not version.exists():
        raise BundleError(f"{folder} lacks Python.h, pyconfig.h or patchlevel.h of Python {python}")
    found = ".".join(re.findall(r"define PY_M(?:AJOR|INOR)_VERSION\s+(\d+)", version.read_text()))
    if found != python:
        raise BundleError(f"{folder} has the headers of Python {found}, not of {python}")
    return folder.resolve()


def _installed_headers(python: str) -> Path | None:
    program = shutil.which(f"python{python}")
    if program is None:
        return None
    ask = [program, "-c", "import sysconfig; print(sysconfig.get_path('include'))"]
    folder = Path(subprocess.run(ask, capture_output=True, text=True).stdout.strip())
    return folder if (folder / "Python.h").exists() else None


def fetch_wheels(requirements: Iterable[str], python: str, scratch: Path) -> list[Path]:
    """The wheels of `requirements`, each pinned, for that Python on Linux on x86-64, without what they depend on.

    Raises:
        BundleError: one is not pinned.
        FetchError: one could not be fetched.
    """
    folder = scratch / "wheels"
    folder.mkdir()
    target = ["--python-version", python, "--implementation", "cp"]
    target += [option for platform in _PLATFORMS for option in ("--platform", platform)]
    for requirement in requirements:
        if "==" not in requirement:
            raise BundleError(f"--wheels {requirement}: name a version, as in package==1.2")
    return [pip_download(requirement, folder, target=target) for requirement in requirements]
