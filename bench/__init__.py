"""What the adapters cost: the frozen base, eager PyTorch and gci_kernels, timed side by side in one run.

Installed as `gci_kernels.bench` and started by `gci-kernels bench`. The layer cases are also a pytest-benchmark
suite: `pytest bench --benchmark-only`. No time is shown for a computation that has not passed its correctness gate.
"""
