"""What impl="auto" may take on a GPU: kernels that are proved there, from the numbers of tokens at which they pay.

On a GPU without a record, a variant's first use checks it against float64 (self_check.py) and times it against the
library (timing.py), which takes seconds, nearly all of them spent in the compiler, and keeps both, once for each GPU
and version of the kernel. Of several processes one does so, while the others wait for its record. GCI_SELF_CHECK=0
keeps unproved kernels off without checking; `gci-kernels verify --device cuda` checks all of them again.
"""

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from gci_kernels.accuracy import Check
from gci_kernels.files import cache_dir
from gci_kernels.hardware import records, self_check, timing
from gci_kernels.hardware.kernels import KERNELS, get, names
from gci_kernels.hardware.locking import alone
from gci_kernels.hardware.records import Key, Record, find, keep, make_record, missing, variant_of, warn_once

_LOCK = threading.RLock()
#: Seconds after which what could not be checked, for want of memory, is tried again.
RETRY_AFTER = 60.0
_not_before: dict[Key, float] = {}
Answer = TypeVar("Answer")


# What "auto" asks


def takes(
    kernel: str, tokens: int, dtype: torch.dtype, device: torch.device | None = None, *, dropout: bool = False,
    starts: Mapping[str, int | None] | None = None,
) -> bool:  # fmt: skip
    """Whether "auto" takes the registered `kernel` for `tokens` tokens of x in `dtype` on x's `device`.

    Args:
        device: None: the current GPU.
        dropout: whether x is dropped out.
        starts: the fewest tokens from which each proved kernel is taken, None: for none; with it, nothing is asked.
            None: :func:`start` is asked, which may run a kernel's first use.
    """
    if starts is not None:
        found = starts.get(kernel)
    else:
        found = None if tokens < _least(kernel) else start(kernel, dtype, device, dropout=dropout)
    return found is not None and tokens >= found


def settled(
    kernels: Iterable[str], tokens: int, dtype: torch.dtype, device: torch.device, dropout: bool
) -> tuple[bool, ...] | None:
    """What :func:`takes` says of each of `kernels`, where all answers are lasting and known; else None.

    Every call of a layer asks it.
    """
    index, taken = _index(device), []
    for kernel in kernels:
        if tokens < _floor(kernel):
            taken.append(False)
            continue
        found = records.starts.get((kernel, dtype, dropout, index), _UNKNOWN)  # type: ignore[arg-type]
        if found == _UNKNOWN:
            return None
        taken.append(found is not None and tokens >= found)
    return tuple(taken)


_UNKNOWN = -1  # no number of tokens


# Dynamo calls these three while it traces, and takes the answer for a constant of the compiled function.
@torch.compiler.assume_constant_result
def proves(kernel: str, dtype: torch.dtype, device: torch.device | None = None, *, dropout: bool = False) -> bool:
    """Whether `kernel` is proved for x in `dtype` on `device` (None: the current GPU); its first use is checked."""
    return _settle(_proof, records.proofs, (kernel, dtype, dropout, _index(device))) is True


@torch.compiler.assume_constant_result
def start(kernel: str, dtype: torch.dtype, device: torch.device | None = None, *, dropout: bool = False) -> int | None:
    """The fewest tokens from which "auto" takes `kernel`, None: for none; its first use is checked and timed.

    Of a kernel without stages, which is not timed, its `least`.
    """
    return _settle(_start, records.starts, (kernel, dtype, dropout, _index(device)))


@torch.compiler.assume_constant_result
def _least(kernel: str) -> int:
    return _floor(kernel)


def _floor(kernel: str) -> int:
    """For fewer tokens, "auto" does not take the kernel."""
    return timing.TOKENS[0] if get(kernel).timed else get(kernel).least


def recorded(kernel: str, dtype: torch.dtype, device: torch.device, *, dropout: bool = False) -> int | None:
    """What :func:`start` would say by the records alone: nothing is run."""
    record = None if missing(kernel) else find(kernel, device, variant_of(kernel, dtype, dropout))
    if record is None or not record.passed:
        return None
    if not get(kernel).timed:
        return get(kernel).least
    timed = _timed(kernel, dtype, device)
    return None if timed is None else timed.start


def state(kernel: str, device: torch.device) -> str:
    """What the record of the whole kernel says, "proved" or "failed"; "unproved" without one. Nothing is run."""
    record = find(kernel, device)
    return "unproved" if record is None else "proved" if record.passed else "failed"


def _index(device: torch.device | None) -> int | None:
    """The GPU's index, which a tensor's device has; else the current one's, None without a GPU."""
    return _current_index() if device is None or device.index is None else device.index


def _current_index() -> int | None:
    """None without a GPU. is_available, which is slow, is called only until CUDA is initialised."""
    usable = torch.cuda.is_initialized() or torch.cuda.is_available()
    return torch.cuda.current_device() if usable else None


# First use


class _NotNowError(Exception):
    """There is no answer that would last."""


def _settle(ask: Callable[[Key], Answer], known: dict[Key, Answer], key: tuple) -> Answer | None:
    """The known answer, or what `ask` returns, which is then known; None without a GPU or a lasting answer."""
    if key[-1] is None:
        return None
    with contextlib.suppress(KeyError):  # another thread may forget it at any time
        return known[key]
    with _LOCK:
        try:
            answer = ask(key)
        except _NotNowError:
            return None
        known[key] = answer
        return answer


def _proof(key: Key) -> bool:
    kernel, dtype, dropout, index = key
    device, variant = torch.device("cuda", index), variant_of(kernel, dtype, dropout)
    if missing(kernel):
        return False
    record = find(kernel, device, variant)
    if record is None:
        with _first_use(key):
            record = find(kernel, device, variant)
            if record is None:
                with _shown(f"gci_kernels checks the GPU kernel {kernel} for {variant}, once on this machine"):
                    record, lasting = _check(kernel, device, (dtype,), (dropout,), variant)
                if not lasting:
                    _not_before[key] = time.monotonic() + RETRY_AFTER
                    raise _NotNowError
    return record.passed


def _start(key: Key) -> int | None:
    kernel, dtype, dropout, index = key
    device = torch.device("cuda", index)
    if not proves(kernel, dtype, device, dropout=dropout):
        if key not in records.proofs:
            raise _NotNowError
        return None
    if not get(kernel).timed:
        return get(kernel).least
    record = _timed(kernel, dtype, device)
    if record is None:
        with _first_use(key):
            record = _timed(kernel, dtype, device) or _time(key, device)
    return record.start if record.passed else None


def _timed(kernel: str, dtype: torch.dtype, device: torch.device) -> Record | None:
    """The record with times for `dtype`. Those without dropout count with it too, when the library has more to do."""
    found = (find(kernel, device, variant_of(kernel, dtype, dropout)) for dropout in (False, True))
    return next((record for record in found if record is not None and record.times), None)


def _time(key: Key, device: torch.device) -> Record:
    """Time a proved variant now, and keep the times in its record."""
    kernel, dtype, dropout, _ = key
    variant = variant_of(kernel, dtype, dropout)
    with _shown(f"gci_kernels times the GPU kernel {kernel} for {variant}, once on this machine"):
        times, reason, lasting = _apart(kernel, device, lambda: timing.measure(kernel, dtype, device))
    record = make_record(kernel, device, times is not None, reason, variant, times)
    if lasting:
        keep(record)
    if times is None:
        _warn(record, lasting)
    if not lasting:
        _not_before[key] = time.monotonic() + RETRY_AFTER
        raise _NotNowError
    records.proofs[key] = record.passed
    return record


@contextlib.contextmanager
def _first_use(key: Key) -> Iterator[None]:
    """For what is run once on a machine: other processes wait here meanwhile, and then find the record.

    Raises _NotNowError where nothing may run now. A capture would record the launches.
    """
    if os.environ.get("GCI_SELF_CHECK") == "0" or _capturing() or time.monotonic() < _not_before.get(key, 0.0):
        raise _NotNowError
    with alone(cache_dir() / "first_use.lock"):
        records.reread()
        yield


def _shown(text: str) -> contextlib.AbstractContextManager[object]:
    """A bar, by the one process that works."""
    from gci_kernels.progress import bar  # imports rich, which programs that use proved kernels do without

    return bar(text, 1)


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def renew(kernel: str, device: torch.device) -> Record:
    """Check all variants of `kernel` on `device` now, keep the answer, and warn where one failed."""
    return _check(kernel, device, self_check.DTYPES, (False, True), "")[0]


def renew_all(device: torch.device, whole_op_failure: str | None = None) -> list[Record]:
    """Check every kernel that there is on `device` now and keep the answers.

    `whole_op_failure`: a case in which all Triton kernels together failed; then none of them is proved, for any may be
    the cause.
    """
    made = [renew(kernel, device) for kernel in KERNELS if not missing(kernel)]
    if whole_op_failure is not None:
        reason, affected = f"the whole op failed: {whole_op_failure}", names("triton")
        for i, record in enumerate(made):
            if record.passed and record.kernel in affected:
                made[i] = dataclasses.replace(record, passed=False, reason=reason)
        keep(*made)
    return [dataclasses.replace(record, source=str(records.own_path())) for record in made]


def _check(
    kernel: str, device: torch.device, dtypes: tuple[torch.dtype, ...], dropouts: tuple[bool, ...], variant: str
) -> tuple[Record, bool]:
    """The record of a check that is run now, kept where it says something about the kernel, and whether it does."""
    passed, reason, lasting = _self_check(kernel, device, dtypes, dropouts)
    record = make_record(kernel, device, passed, reason, variant)
    if lasting:
        keep(record)
    if not passed:
        _warn(record, lasting)
    return record, lasting


def _warn(record: Record, lasting: bool) -> None:
    name = f"gci_kernels: the GPU kernel {record.kernel!r}"
    if lasting:
        again = "`gci-kernels verify --device cuda` checks it again"
        warn_once(f"{name} failed its check on {record.gpu} and is left out: {record.reason}. {again}")
    else:
        warn_once(f"{name} could not be checked on {record.gpu} and is left out for now: {record.reason}")


def _self_check(
    kernel: str, device: torch.device, dtypes: tuple[torch.dtype, ...], dropouts: tuple[bool, ...]
) -> tuple[bool, str, bool]:
    """Whether it passed, why not, and whether that says something about the kernel."""

    # Compiling takes the time: a first use is checked on one shape. CUDA C++ is compiled already.
    first_use = len(dtypes) == 1 and get(kernel).language == "triton"
    shapes = (self_check.USUAL,) if first_use else (self_check.ODD, self_check.LARGE)

    def check() -> list[Check]:
        made = self_check.check_kernel(kernel, device, dtypes=dtypes, shapes=shapes, dropouts=dropouts)
        return [each for each in made if not each.passed]

    failed, reason, lasting = _apart(kernel, device, check)
    if failed:
        case = f"{failed[0].case} {failed[0].dtype} {failed[0].tensor}"
        errors = f"error {failed[0].error:.1e}, allowed {failed[0].bound:.1e}"
        return False, f"{len(failed)} checks, first {case}: {errors}", True
    return failed is not None, reason, lasting


def _apart(kernel: str, device: torch.device, work: Callable[[], Answer]) -> tuple[Answer | None, str, bool]:
    """What `work` returns; where it raises, None, why, and whether that says something about the kernel.

    In a thread of its own, where nothing of the caller's is in force: no autocast, inference mode, fake tensors,
    default device or tracing, and another current stream.
    """

    def run() -> tuple[Answer | None, str, bool]:
        try:
            with torch.no_grad(), torch.cuda.device(device):
                return work(), "", True
        except torch.OutOfMemoryError as error:
            return None, f"no memory for the check: {_first_line(error)}", False
        except Exception as error:  # a kernel that raises anything is not to be used
            return None, f"{type(error).__name__}: {_first_line(error)}", True

    with ThreadPoolExecutor(1, f"gci_kernels check of {kernel}") as thread:
        return thread.submit(run).result()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
