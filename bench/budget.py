"""A run that ends in time on any machine: its seconds, divided among its steps, and the sizes that fit into them."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

Size = TypeVar("Size")

#: Rounds without which there is no median; a size that leaves no time for them is too large.
LEAST_ROUNDS = 2


class Budget:
    """The seconds of a whole run. Each step gets its share of what is left, by the weights of the steps still to come.

    A step that ends early leaves its time to the others, and one that takes too long takes from all of them.

    Args:
        seconds: for all steps together, from now on.
        weights: of every step, in order: how long each takes on a fast machine.
    """

    def __init__(self, seconds: float, weights: Sequence[float]) -> None:
        self._end = time.monotonic() + seconds
        self._weights = list(weights)
        self._until = self._end

    def left(self) -> float:
        """Seconds left for all steps."""
        return self._end - time.monotonic()

    def begin_step(self) -> None:
        """Begin the next step."""
        share = self._weights[0] / sum(self._weights)
        del self._weights[0]
        self._until = time.monotonic() + max(0.0, self.left()) * share

    def step_left(self) -> float:
        """Seconds left for the present step; negative once it has taken too long."""
        return self._until - time.monotonic()


def largest_fitting(
    sizes: Sequence[Size], run: Callable[[Size], object], *, work: Callable[[Size], float],
    whole: Callable[[Size], float], left: Callable[[], float],
) -> Size:  # fmt: skip
    """The largest of `sizes` for which a whole step can be done in the seconds that are `left`.

    It runs the smallest first, and a larger one only where the times so far say that it fits, so that little time is
    lost on a slow machine. A small size takes more time for its work than a large one does, so a size that seems to fit
    does fit. The smallest is returned where none fits.

    Args:
        sizes: from the smallest to the largest.
        run: does the work of a size once.
        work: how much that is, in any unit.
        whole: the work of the whole step at a size, in the same unit.
    """

    def seconds(size: Size) -> float:
        begun = time.perf_counter()
        run(size)
        return time.perf_counter() - begun

    def fits(size: Size, measured: Size, taken: float) -> bool:
        return taken / work(measured) * whole(size) <= left()

    for size, larger in zip(sizes, sizes[1:], strict=False):
        taken = seconds(size)
        if not fits(larger, size, taken):
            taken = min(taken, seconds(size))  # work that is done once may have slowed the first run
        if fits(sizes[-1], size, taken):
            break
        if not fits(larger, size, taken):
            return size
    return sizes[-1]


def halvings(value: int, smallest: int) -> list[int]:
    """`value` and its halves, ascending, none below `smallest`; `value` alone where it is below that itself."""
    halves = [value]
    while halves[0] // 2 >= smallest:
        halves.insert(0, halves[0] // 2)
    return halves
