"""Interleaved timing, peak memory, and the bytes that autograd keeps for backward."""

import ctypes
import gc
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Timing:
    """Samples of one quantity (seconds, or a ratio), with their median and their 10th and 90th percentile."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Iterable[float]) -> "Timing":
        """The timing of `samples`, at least one."""
        values = tuple(samples)
        low, median, high = (float(value) for value in np.percentile(values, [10, 50, 90]))
        return cls(median, low, high, values)

    def __truediv__(self, other: "Timing") -> "Timing":
        """The ratio of two variants: round by round, so that what slowed a whole round cancels out."""
        return Timing.of(a / b for a, b in zip(self.samples, other.samples, strict=True))

    def rate(self, amount: float) -> "Timing":
        """`amount` per second, of samples that are seconds."""
        return Timing.of(amount / seconds for seconds in self.samples)


def interleave(
    fns: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int,
    warmup: int = 1,
    advance: Callable[[int, int], None] = lambda done, of: None,
    before: Mapping[str, Callable[[], object]] | None = None,
    prepare: Callable[[], None] = lambda: None,
    left: Callable[[], float] = lambda: math.inf,
    least: int = 1,
) -> dict[str, Timing]:
    """Time every function once a round. The order rotates by one each round, so that none always runs first.

    Args:
        device: where the functions work; on CUDA the time is that between two events on the stream.
        warmup: rounds that run first and are not counted.
        advance: called after every round, warm-up rounds included, with the number done and how many there will be.
        before: called before the function of the same name, warm-up rounds included, and not timed.
        prepare: called before every function, after `before`, and not timed; see :func:`cold_cache`.
        left: the seconds that are left. No round begins that would not end in them if it were as slow as the slowest.
        least: rounds that are timed however little time is left.

    Returns:
        name -> seconds for one call.
    """
    names = list(fns)
    samples: dict[str, list[float]] = {name: [] for name in names}
    slowest, done, wanted = 0.0, 0, warmup + rounds
    while done < wanted:
        begun, first = time.perf_counter(), done % len(names)
        for name in names[first:] + names[:first]:
            if before and name in before:
                before[name]()
            seconds = _seconds(fns[name], device, prepare)
            if done >= warmup:
                samples[name].append(seconds)
        taken = time.perf_counter() - begun
        slowest, done = max(slowest, taken) if done > warmup else taken, done + 1
        fitting = int(min(rounds, max(0.0, left()) / slowest))
        wanted = min(warmup + rounds, max(warmup + least, done + fitting))
        advance(done, wanted)
    return {name: Timing.of(values) for name, values in samples.items()}


def cold_cache(device: torch.device) -> Callable[[], None]:
    """For `prepare` on a GPU: evicts all that is useful from its L2, and queues 2 ms of work before what is timed.

    The functions' kernels are then launched while the GPU is busy, and only its own time is measured. The last pass
    reads: lines that were written would have to be written back while the clock runs.
    """
    if device.type != "cuda":
        return lambda: None
    buffer = torch.empty(1 << 28, dtype=torch.float32, device=device)  # 1 GiB

    def prepare() -> None:
        for _ in range(8):
            buffer.zero_()
        buffer.sum()

    return prepare


def _seconds(fn: Callable[[], object], device: torch.device, prepare: Callable[[], None]) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        prepare()
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    prepare()
    begun = time.perf_counter()
    fn()
    return time.perf_counter() - begun


def peak_memory(fn: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `fn` needed at its peak, above what was in use before it.

    On CUDA, of torch's allocator. On a CPU, of the process, from the high-water mark that Linux keeps and resets on
    request. None where the system keeps no such mark.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return None
    # Memory that was freed but is still held by malloc would be reused without raising the mark.
    ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:  # a kernel or a container that has no such file
        return None
    before = _status_bytes("VmRSS")
    fn()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def saved_bytes(fn: Callable[[], object], model: nn.Module) -> int:
    """Bytes of the storages that autograd keeps alive for backward while `fn` runs.

    A storage counts once, in full, however many views of it are saved. `model`'s parameters and buffers, and the
    copies of :func:`kept_copies`, are alive anyway and don't count.
    """
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage  # a reference, so that no other storage gets its address
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fn()
    # After the forward: the first one makes the copies.
    alive = itertools.chain(model.parameters(), model.buffers(), kept_copies(model))
    known = {tensor.untyped_storage().data_ptr() for tensor in alive}
    return sum(storage.nbytes() for address, storage in saved.items() if address not in known)


def kept_copies(model: nn.Module) -> list[Tensor]:
    """The copies of weights, with the trained rows in them, that a model's LoKI layers keep between steps."""
    merged = (getattr(module, "merged_rows", None) for module in model.modules())
    return [copy for rows in merged if rows is not None for copy in rows.copies()]
