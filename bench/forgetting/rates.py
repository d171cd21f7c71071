"""Learning rates, by one rule for all methods: the lowest with which a method reaches the target in its steps.

A higher rate reaches it sooner and forgets more, so forgetting can be compared only with one rule for all rates. The
rule depends on the domain loss alone, in runs with a seed that no row of the table has.
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
    """The rate of the method `name` by the rule, starting with its present one; None where the highest is too low.

    `after` is called after every evaluation of a run.
    """

    def reaches(rate: float) -> bool:
        method = replace(METHODS[name], learning_rate=rate)
        return runs.run(name, method, SEED, after, trial=True)["matched"] is not None

    return lowest(reaches, METHODS[name].learning_rate)


def lowest(reaches: Callable[[float], bool], start: float) -> float | None:
    """The lowest rate of GRID for which `reaches` is true, searched downwards or upwards from `start`; None: none is.

    If a rate reaches the target, all above it are taken to do so too.
    """
    index = GRID.index(start)
    if not reaches(start):
        return next((rate for rate in GRID[index + 1 :] if reaches(rate)), None)
    while index and reaches(GRID[index - 1]):
        index -= 1
    return GRID[index]


def trials(runs: Runs) -> list[dict]:
    """The results of all finished trial runs, by method and rate."""
    methods = [(name, replace(METHODS[name], learning_rate=rate)) for name in SEARCHED for rate in GRID]
    paths = [runs.path(name, method, SEED) for name, method in methods]
    return [runs.read(path) for path in paths if path.exists()]
