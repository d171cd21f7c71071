"""Python threads that share a CPU's cores, for work whose pieces need nothing of each other."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


@contextlib.contextmanager
def workers(count: int) -> Iterator[Callable]:
    """A `map` that makes `count` calls at a time, each with its share of torch's threads; Python's own for 1.

    Where all cores work on one operation after another, they wait for the slowest at the end of each. What a call gives
    depends on the number of its threads alone, not on the other calls.
    """
    if count == 1:
        yield map
        return
    threads = torch.get_num_threads()
    try:
        # Each thread has a number of threads of its own; setting it also sets what threads that start later begin with.
        share = (max(1, threads // count),)
        with ThreadPoolExecutor(count, "loki", initializer=torch.set_num_threads, initargs=share) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)
