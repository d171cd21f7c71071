"""Python threads that share a CPU's cores, for independent pieces of work."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


@contextlib.contextmanager
def workers(count: int) -> Iterator[Callable]:
    """Yields a `map` that makes `count` calls at a time, each with its share of torch's threads; Python's own for 1.

    Where all cores share every operation, they wait for the slowest at the end of each. A call's result depends only on
    the number of its threads, not on the other calls.
    """
    if count == 1:
        yield map
        return
    threads = torch.get_num_threads()
    try:
        # torch keeps this number for each thread; setting it also sets the default of threads that start later.
        share = (max(1, threads // count),)
        with ThreadPoolExecutor(count, "loki", initializer=torch.set_num_threads, initargs=share) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)
