"""The stages of one adapted layer by themselves, Triton against the library; each is checked before it is timed.

Which stages there are, and their operands, each registered kernel says itself (`stages` of hardware.Kernel).
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.hardware import KERNELS, Shape
from gci_kernels.hardware.stages import Stage
from gci_kernels.proof.verify import obstacle, widened

from .correctness import CorrectnessError
from .costs import chip_of, floor
from .timing import cold_cache, interleave

Entry = dict[str, Any]


def guarded(name: str, measure: Callable[[], Entry]) -> Entry:
    """An entry: what `measure` returns, or the error that it ended with; its memory is freed."""
    try:
        return {"name": name, **measure()}
    except Exception as error:  # the report shows it, and the other entries are still measured
        return {"name": name, "error": f"{type(error).__name__}: {error}"}
    finally:
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def stage_entries(method: str, shape: Shape, dtype: torch.dtype, device: torch.device, rounds: int) -> Iterator[Entry]:
    """An entry for each stage of each registered kernel in a layer of `shape`, whose weights are all of `dtype`.

    It has times by implementation, errors, and the least time that the chip's rates allow.
    """
    reason = obstacle("triton", device.type, dtype)
    least, prepare = _floor(shape, dtype, device), cold_cache(device)

    def measure(name: str, stage: Stage) -> Entry:
        made = {impl: run for impl, run in stage.implementations.items() if impl != "triton" or not reason}
        stage = stage._replace(implementations=made)
        errors = _check(stage, dtype)
        fns = {impl: partial(run, stage.operands, dtype) for impl, run in made.items()}
        seconds = interleave(fns, device=device, rounds=rounds, warmup=3, prepare=prepare)
        return {
            "method": method,
            "floor_seconds": least.get(name),
            "errors": errors,
            "left_out": {"triton": reason} if reason else {},
            "seconds": {impl: asdict(timing) for impl, timing in seconds.items()},
        }

    for kernel in KERNELS.values():
        for name, stage in kernel.stages(shape, dtype, device).items():
            yield guarded(name, partial(measure, name, stage))


def _floor(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The least time of each stage by name; nothing where the device's rates are not listed."""
    chip = chip_of(device)
    return {} if chip is None else {cost.name: cost.seconds(chip, dtype) for cost in floor(shape, dtype, dtype)}


def _check(stage: Stage, dtype: torch.dtype) -> dict[str, list[float]]:
    """The errors of every implementation's results; CorrectnessError where one's exceed twice the library's."""
    truth = stage.implementations["aten"](widened(stage.operands), torch.float64)
    errors = {
        impl: [relative_error(a, t) for a, t in zip(run(stage.operands, dtype), truth, strict=True)]
        for impl, run in stage.implementations.items()
    }
    for impl, made in errors.items():
        for plain, actual in zip(errors["aten"], made, strict=True):
            if not actual <= error_bound(plain, dtype):
                named = f"{impl.capitalize()} differs from float64 by {actual:.2e}"
                raise CorrectnessError(f"{named}, the library by {plain:.2e}")
    return errors
