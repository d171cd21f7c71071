"""The command line: gci-kernels info | verify | bench."""

import argparse
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries in this process (Linux). Two of them are two pools of threads that fight for the cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if re.search(r"lib(g|i)?omp\d*[-.]", line)}
    return sorted(os.path.realpath(path) for path in paths)


def info(_: argparse.Namespace) -> int:
    """What this machine has, which kernels run on it, which never ran on real hardware."""
    import torch

    from gci_kernels import __version__, native
    from gci_kernels.bench.models import cache_dir
    from gci_kernels.ops.bottleneck import choose_plan

    facts = Table("", "", title=f"gci_kernels {__version__}", show_header=False)
    facts.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "triton", "transformers", "peft"):
        facts.add_row(package, _version(package))
    facts.add_row("CPU threads", str(torch.get_num_threads()))
    extension = f"built, {native.ISA}" if native.available() else f"missing: {native.why_unavailable()}"
    facts.add_row("C++ kernels", extension)
    facts.add_row("OpenMP runtimes", ", ".join(openmp_runtimes()) or "unknown")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts.add_row("GPUs", ", ".join(devices) or "none")
    facts.add_row("cache folder", str(cache_dir()))

    plans = Table("device", "dtype", "tokens", "plan of lora_linear and loramoe_linear", title='What impl="auto" runs')
    for device in ["cpu"] + (["cuda"] if devices else []):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for tokens in (1, 2048):
                plan = choose_plan("auto", tokens=tokens, dtype=dtype, device_type=device)
                plans.add_row(device, str(dtype).removeprefix("torch."), str(tokens), str(plan))
    console = Console()
    console.print(facts)
    console.print(plans)
    console.print(
        'Kernels by hardware: "native" is proved on CPUs by `gci-kernels verify`. The Triton kernels are proved by '
        'their interpreter and have never run on a GPU: there "auto" is "aten", the library\'s products, and '
        'impl="triton" asks for them.'
    )
    return 0


def verify(args: argparse.Namespace) -> int:
    """Every implementation against the float64 reference; exit status 1 if one fails."""
    from gci_kernels.verify import CASES, DTYPES
    from gci_kernels.verify import verify as run

    groups = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("verify", total=len(CASES) * len(DTYPES) * 3)
        for checks in run(args.device):
            groups.append(checks)
            progress.advance(task)
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
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of `gci-kernels` and `python -m gci_kernels`."""
    from gci_kernels.bench import run as bench

    parser = argparse.ArgumentParser(prog="gci-kernels", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("info", help="what this machine has and which kernels run on it")
    command.set_defaults(run=info)
    command = commands.add_parser("verify", help="check every kernel against the float64 reference")
    command.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    command.set_defaults(run=verify)
    command = commands.add_parser("bench", help="frozen base, eager PyTorch and gci_kernels side by side")
    bench.add_arguments(command)
    command.set_defaults(run=bench.main)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
