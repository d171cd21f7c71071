"""All checks of many classes, each class in its own process, so that a crash or a hang affects only that class."""

import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import transformers

from . import checks, tiny
from .table import METHODS, Row

SECONDS = 120.0  # the limit for one class; most take a few seconds


def check_class(name: str, methods: Iterable[str] = tuple(METHODS)) -> Row:
    """The outcome of each method in a class, or under "left_out" why the class itself cannot be checked."""
    row: Row = {"name": name, "kind": tiny.classes()[name]}
    try:
        model = tiny.tiny_model(name)
    except Exception as error:
        return row | {"left_out": f"cannot be made tiny: {_short(error)}"}
    try:
        row["inputs"], inputs = checks.check_base(model)
    except Exception as error:
        return row | {"left_out": f"does not run by itself: {_short(error)}"}
    return row | {"methods": {method: checks.check(model, inputs, method) for method in methods}}


def _short(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    location = f" ({os.path.basename(where.filename)})"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{location}"


def sweep(
    names: list[str],
    methods: Iterable[str],
    processes: int,
    done: Callable[[Row, float], None],
    seconds: float = SECONDS,
) -> list[Row]:
    """The rows of the classes `names`, in their order.

    Args:
        names: the classes.
        methods: the methods to check.
        processes: how many classes at a time.
        done: called with each row and its seconds when it is finished.
        seconds: the limit for one class.
    """
    context, waiting, rows = multiprocessing.get_context("fork"), list(names), {}
    running: dict[Connection, tuple[str, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            name = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, name, tuple(methods)))
            process.start()
            theirs.close()
            running[ours] = (name, process, time.monotonic())
        ready = wait(list(running), timeout=1.0)
        for ours, (name, process, begun) in list(running.items()):
            spent = time.monotonic() - begun
            if ours not in ready and spent < seconds:
                continue
            if ours in ready:
                rows[name] = _received(ours, name, process)
            else:
                process.kill()
                rows[name] = _lost(name, f"takes more than {seconds:.0f} seconds")
            process.join()
            ours.close()
            del running[ours]
            done(rows[name], spent)
    return [rows[name] for name in names]


def _child(connection: Connection, name: str, methods: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    connection.send(check_class(name, methods))


def _received(connection: Connection, name: str, process: Any) -> Row:
    try:
        return connection.recv()
    except EOFError:
        process.join()
        return _lost(name, f"its process ended with {process.exitcode}")


def _lost(name: str, why: str) -> Row:
    return {"name": name, "kind": tiny.classes()[name], "left_out": why}
