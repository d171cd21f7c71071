"""How fast PyTorch multiplies matrices of each dtype on this CPU, and so which dtypes are worth measuring on it."""

import time
from dataclasses import dataclass

import torch

#: The dtypes that a run measures on a CPU by default; bfloat16 only where it is fast.
CANDIDATES = ("float32", "bfloat16")
#: A dtype counts as fast at this share of float32's rate: half the bytes make up for half the rate.
FAST = 0.5
TOKENS, FEATURES = 128, 256
SECONDS = 0.02  # for each of two products of each dtype, or one call where that takes longer


@dataclass(frozen=True)
class Rates:
    """GFLOP/s of x @ W.T, a layer's forward, and of dY @ W, its dX, on one thread.

    A library can be fast at one and slow at the other.
    """

    forward: float
    dx: float

    @property
    def slower(self) -> float:
        """The lower of the two rates."""
        return min(self.forward, self.dx)


def product_rates(dtype: torch.dtype) -> Rates:
    """Measured on the CPU in a few hundredths of a second.

    On one thread: where other work uses the cores, several threads would measure their waiting for each other.
    """
    x, w, dy = (torch.randn(rows, FEATURES).to(dtype) for rows in (TOKENS, FEATURES, TOKENS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return Rates(_rate(x, w.t()), _rate(dy, w))
    finally:
        torch.set_num_threads(threads)


def _rate(a: torch.Tensor, b: torch.Tensor) -> float:
    """GFLOP/s of the fastest call: other work on the machine makes calls slower, never faster."""
    a @ b  # the first call makes the library's kernel
    fastest, end = float("inf"), time.perf_counter() + SECONDS
    while True:
        begun = time.perf_counter()
        a @ b
        now = time.perf_counter()
        fastest = min(fastest, now - begun)
        if now >= end:
            return 2 * a.shape[0] * a.shape[1] * b.shape[1] / fastest / 1e9


def fast_dtypes(rates: dict[str, Rates]) -> tuple[str, ...]:
    """float32, and the dtypes of `rates` that are fast compared with it."""
    least = FAST * rates["float32"].slower
    return tuple(name for name, rate in rates.items() if name == "float32" or rate.slower >= least)


def slowness(rates: dict[str, Rates]) -> dict[str, float]:
    """The time of each relative to float32's, within [1/2, 2], as a training step is not only products."""
    return {name: min(2.0, max(0.5, rates["float32"].slower / rate.slower)) for name, rate in rates.items()}
