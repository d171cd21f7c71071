"""`--register FILE`: methods that gci_kernels does not have, brought by a Python file."""

import argparse
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

#: The commands that have the option.
COMMANDS = ("verify", "bench")


def add_register(parser: argparse.ArgumentParser) -> None:
    """Adds the option, which :func:`register_files` reads before all others."""
    parser.add_argument(
        "--register", action="append", metavar="FILE", help="a Python file that registers a method; may be repeated"
    )


def register_files(argv: Sequence[str]) -> None:
    """Runs the files that --register names: what they register is a choice of other options, made after this.

    Raises:
        SystemExit: a file cannot be run, or registers nothing; with GCI_DEBUG=1 the file's own error.
    """
    if not argv or argv[0] not in COMMANDS:
        return
    parser = argparse.ArgumentParser(prog=f"gci-kernels {argv[0]}", add_help=False)
    add_register(parser)
    for path in parser.parse_known_args(argv[1:])[0].register or ():
        _run(Path(path))


def _run(path: Path) -> None:
    from gci_kernels.tuners import METHODS

    path, before = path.resolve(), dict(METHODS)
    if str(path) in {getattr(module, "__file__", None) for module in [*sys.modules.values()]}:
        return  # named twice, or imported already
    name = _module_name(path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"--register {path}: this is no Python file")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.parent))  # as for a script, modules beside it can be imported
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        if os.environ.get("GCI_DEBUG") == "1":
            raise
        raise SystemExit(f"--register {path}{_line(path, error)}: {type(error).__name__}: {error}") from error
    if before == METHODS:
        raise SystemExit(f"--register {path}: it registers no method; it has to call gci_kernels.register")


def _module_name(stem: str) -> str:
    """The name of the file's module: no other module's, for pickles find classes by it."""
    name, number = stem, 2
    while name in sys.modules or importlib.util.find_spec(name) is not None:
        name, number = f"{stem}_{number}", number + 1
    return name


def _line(path: Path, error: Exception) -> str:
    """ ", line N" of the file, where the error comes from one."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    return f", line {frames[-1]}" if frames else ""
