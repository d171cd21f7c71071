"""Learning rates by one rule for all: the lowest with which a method gets to the target in the steps that it has.

A higher rate gets there sooner and forgets more on its way, so how much a method forgets says little without a rule for
its rate. This one looks at the domain loss alone, in runs of a seed that is in no row of the table.
"""

from collections.abc import Callable
from dataclasses import replace

from .methods import METHODS
from .runs import Runs
from .training import History

GRID = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
SEED = 100
# REGA and the balance constraint are compared with the method without them, at its rate.
SEARCHED = tuple(name for name in METHODS if name not in ("lora_rega", "loramoe_balance"))


def search(runs: Runs, name: str, after: Callable[[History], None]) -> float | None:
    """The rate of a method by the rule, beginning with the one that it has; None where even the highest is too low."""

    def reaches(rate: float) -> bool:
        method = replace(METHODS[name], learning_rate=rate)
        return runs.run(name, method, SEED, after, trial=True)["matched"] is not None

    return lowest(reaches, METHODS[name].learning_rate)


def lowest(reaches: Callable[[float], bool], start: float) -> float | None:
    """The lowest rate of GRID that `reaches`, where all above it do; asked from `start` on, downwards or upwards."""
    place = GRID.index(start)
    if not reaches(start):
        return next((rate for rate in GRID[place + 1 :] if reaches(rate)), None)
    while place and reaches(GRID[place - 1]):
        place -= 1
    return GRID[place]


def trials(runs: Runs) -> list[dict]:
    """All trial runs that are there, by method and rate."""
    found = []
    for name in SEARCHED:
        for rate in GRID:
            path = runs.path(name, replace(METHODS[name], learning_rate=rate), SEED)
            if path.exists():
                found.append(runs.read(path))
    return found
