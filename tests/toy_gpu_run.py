"""A run of `python -m bench.gpu` in which nothing has happened yet."""

from pathlib import Path

from gci_kernels.bench import gpu


def quick_run(folder: Path) -> gpu.Run:
    """The run of a rehearsal, which writes into `folder`; the environment names its commit."""
    options = ["--device", "cpu", "--quick", "--out", str(folder)]
    return gpu.Run(gpu.parse(options), gpu.SECONDS, ("kernels", *gpu.STEPS))
