"""How fast PyTorch multiplies each dtype on this CPU, and so which dtypes are worth measuring on it."""

import time
from dataclasses import dataclass

import torch

#: What a run measures on a CPU unless it is told otherwise, as far as the processor multiplies it. float32 always is.
CANDIDATES = ("float32", "bfloat16")
#: A dtype counts as fast at this share of float32's rate: what reads half the bytes is then no worse to train in.
FAST = 0.5
TOKENS, FEATURES = 128, 256
SECONDS = 0.02  # for each of two products of each dtype; a slow one takes its one call's time


@dataclass(frozen=True)
class Rates:
    """GFLOP/s of x @ W.T, a layer's forward, and of dY @ W, its dX, on one thread.

    Libraries can be fast at one of them alone.
    """

    forward: float
    dx: float

    @property
    def slower(self) -> float:
        return min(self.forward, self.dx)


def product_rates(dtype: torch.dtype) -> Rates:
    """Measured on the CPU in a few hundredths of a second.

    On one thread: where other work has the cores, threads that wait for each other say more of it than of the product.
    """
    x, w, dy = (torch.randn(rows, FEATURES).to(dtype) for rows in (TOKENS, FEATURES, TOKENS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return Rates(_rate(x, w.t()), _rate(dy, w))
    finally:
        torch.set_num_threads(threads)


def _rate(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the fastest call: whatever else the machine does makes some slower, and none faster."""
    a @ b  # the first call prepares the library's kernel
    fastest, end = float("inf"), time.perf_counter() + SECONDS
    while True:
        begun = time.perf_counter()
        a @ b
        now = time.perf_counter()
        fastest = min(fastest, now - begun)
        if now >= end:
            return 2 * a.shape[0] * a.shape[1] * b.shape[1] / fastest / 1e9


def fast_dtypes(rates: dict[str, Rates]) -> tuple[str, ...]:
    """The names of those that are float32, or fast beside it."""
    least = FAST * rates["float32"].slower
    return tuple(name for name, rate in rates.items() if name == "float32" or rate.slower >= least)


def slowness(rates: dict[str, Rates]) -> dict[str, float]:
    """How long each takes where float32 takes 1; at least 1/2 and at most 2: products are not all."""
    return {name: min(2.0, max(0.5, rates["float32"].slower / rate.slower)) for name, rate in rates.items()}
