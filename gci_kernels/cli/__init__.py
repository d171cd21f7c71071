"""The command line: gci-kernels info | verify | bench | tune | attribute | select | convert | rega."""

import argparse
import errno
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gci_kernels.files import CacheError

# What is no fault of the program: nothing may be written, or no more.
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR)


def info(_: argparse.Namespace) -> int:
    """What this machine has, which kernels run on it, which never ran on real hardware."""
    from gci_kernels.proof.info import show

    show(Console())
    return 0


def verify(args: argparse.Namespace) -> int:
    """Every implementation against the float64 reference; exit status 1 if one fails. On a GPU, kept as records."""
    import torch

    from gci_kernels import hardware
    from gci_kernels.files import make_cache_dir
    from gci_kernels.progress import bar
    from gci_kernels.proof.verify import DTYPES, IMPLS, cases
    from gci_kernels.proof.verify import verify as run

    on_gpu = torch.device(args.device).type == "cuda"
    if on_gpu:
        make_cache_dir()  # raises, before the minutes of checking, where no record could be kept
    groups = []
    with bar("verify", len(cases()) * len(DTYPES) * len(IMPLS)) as progress:
        for checks in run(args.device):
            groups.append(checks)
            progress.advance()
    table = Table("impl", "dtype", "checks", "worst tensor", "in case", "error", "allowed", "")
    kinds: dict[tuple[str, str], list] = {}
    for checks in groups:
        kinds.setdefault((checks[0].impl, checks[0].dtype), []).extend(checks)
    for (impl, dtype), checks in sorted(kinds.items()):
        worst = max(checks, key=lambda check: check.error / check.bound)
        table.add_row(
            impl, dtype, str(len(checks)), worst.tensor, worst.case, f"{worst.error:.1e}", f"{worst.bound:.1e}",
            "ok" if worst.passed else "FAILED",
        )  # fmt: skip
    failed = [check for checks in groups for check in checks if not check.passed]
    Console().print(table)
    for check in failed:
        print(f"FAILED {check.impl} {check.dtype} {check.case}: {check.tensor} {check.error:.2e} > {check.bound:.2e}")
    print(f"{sum(map(len, groups)) - len(failed)} of {sum(map(len, groups))} checks passed")
    unproved = False
    if on_gpu:
        whole = next((f"{c.case} {c.dtype}: {c.tensor}" for c in failed if c.impl == "triton"), None)
        for record in hardware.renew_all(torch.device(args.device), whole):
            print(f"kernel {record.kernel} on {record.gpu}: {record}")
            unproved |= not record.passed
        for kernel in filter(hardware.missing, hardware.KERNELS):
            print(f"kernel {kernel}: {hardware.missing(kernel)}")
    return 1 if failed or unproved else 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of `gci-kernels` and `python -m gci_kernels`: the exit status.

    What the machine refuses (a cache folder, room on the disk) and an interruption end in one line on stderr; with
    GCI_DEBUG=1 in a traceback.
    """
    try:
        return _run(argv)
    except (OSError, KeyboardInterrupt) as error:
        if os.environ.get("GCI_DEBUG") == "1":
            raise
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            return 130
        if not isinstance(error, CacheError) and error.errno not in _REFUSED:
            raise
        print(error, file=sys.stderr)
        return 1


def _run(argv: list[str] | None) -> int:
    from gci_kernels.bench import command as bench
    from gci_kernels.bench import tune
    from gci_kernels.cli import convert, loki, rega

    # First of all: the methods that they register are choices of other options.
    register_files(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="gci-kernels", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("info", help="what this machine has and which kernels run on it")
    command.set_defaults(run=info)
    command = commands.add_parser("verify", help="check every kernel against the float64 reference")
    add_register(command)
    command.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    command.set_defaults(run=verify)
    command = commands.add_parser("bench", help="frozen base, eager PyTorch and gci_kernels side by side")
    add_register(command)
    bench.add_arguments(command)
    command.set_defaults(run=bench.main)
    command = commands.add_parser("tune", help="find faster launch configurations of the Triton kernels on this GPU")
    tune.add_arguments(command)
    command.set_defaults(run=tune.main)
    command = commands.add_parser("attribute", help="LoKI: score a model's knowledge vectors on a text file")
    loki.add_attribute_arguments(command)
    command.set_defaults(run=loki.attribute)
    command = commands.add_parser("select", help="LoKI: choose rows to train by their scores")
    loki.add_select_arguments(command)
    command.set_defaults(run=loki.choose)
    command = commands.add_parser("convert", help="checkpoints of the published LoRAMoE and LoKI to ours, and back")
    convert.add_arguments(command)
    command.set_defaults(run=convert.main)
    command = commands.add_parser("rega", help="REGA: general answers by the model itself, and mixtures to train on")
    rega.add_arguments(command)
    args = parser.parse_args(argv)
    return args.run(args)


def add_register(command: argparse.ArgumentParser) -> None:
    """The option that brings methods which gci_kernels does not have."""
    command.add_argument(
        "--register", action="append", metavar="FILE", help="a Python file that registers a method; may be repeated"
    )


def register_files(argv: list[str]) -> None:
    """Runs the files that follow --register, as modules named after them."""
    import importlib.util

    for option, path in zip(argv, argv[1:], strict=False):
        name = Path(path).stem
        if option != "--register" or name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not Path(path).is_file():
            raise SystemExit(f"--register {path}: this is no Python file")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
