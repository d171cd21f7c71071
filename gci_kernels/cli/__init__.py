"""The command line: gci-kernels info | verify | bench | tune | attribute | select | convert | rega."""

import argparse
import errno
import os
import sys
from itertools import groupby
from operator import attrgetter

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
    from gci_kernels.proof.verify import DTYPES, IMPLS, Check, cases
    from gci_kernels.proof.verify import verify as run

    on_gpu = torch.device(args.device).type == "cuda"
    if on_gpu:
        make_cache_dir()  # raises, before the minutes of checking, where no record could be kept
    checks: list[Check] = []
    with bar("verify", len(cases()) * len(DTYPES) * len(IMPLS)) as progress:
        for found in run(args.device):
            checks += found
            progress.advance()
    table = Table("impl", "dtype", "checks", "worst tensor", "in case", "error", "allowed", "")
    kind = attrgetter("impl", "dtype")
    for (impl, dtype), group in groupby(sorted(checks, key=kind), key=kind):
        found = list(group)
        worst = max(found, key=lambda check: check.error / check.bound)
        table.add_row(
            impl, dtype, str(len(found)), worst.tensor, worst.case, f"{worst.error:.1e}", f"{worst.bound:.1e}",
            "ok" if worst.passed else "FAILED",
        )  # fmt: skip
    failed = [check for check in checks if not check.passed]
    Console().print(table)
    for check in failed:
        print(f"FAILED {check.impl} {check.dtype} {check.case}: {check.tensor} {check.error:.2e} > {check.bound:.2e}")
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed")
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
    from gci_kernels.cli import convert, loki, rega, registering

    registering.register_files(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="gci-kernels", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    found: dict[str, argparse.ArgumentParser] = {}
    for name, run, about in (
        ("info", info, "what this machine has and which kernels run on it"),
        ("verify", verify, "check every kernel against the float64 reference"),
        ("bench", bench.main, "frozen base, eager PyTorch and gci_kernels side by side"),
        ("tune", tune.main, "find faster launch configurations of the Triton kernels on this GPU"),
        ("attribute", loki.attribute, "LoKI: score a model's knowledge vectors on a text file"),
        ("select", loki.choose, "LoKI: choose rows to train by their scores"),
        ("convert", convert.main, "checkpoints of the published LoRAMoE and LoKI to ours, and back"),
        ("rega", None, "REGA: general answers by the model itself, and mixtures to train on"),
    ):
        found[name] = commands.add_parser(name, help=about)
        found[name].set_defaults(run=run)
    for name in registering.COMMANDS:
        registering.add_register(found[name])
    found["verify"].add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    bench.add_arguments(found["bench"])
    tune.add_arguments(found["tune"])
    loki.add_attribute_arguments(found["attribute"])
    loki.add_select_arguments(found["select"])
    convert.add_arguments(found["convert"])
    rega.add_arguments(found["rega"])  # each of its commands has its own `run`
    args = parser.parse_args(argv)
    return args.run(args)
