"""Which kernels are proved on which GPU: what impl="auto" may take there.

A record says that one kernel, as its source files are now, passed or failed its tests on one GPU with one compiler.
Records are shipped (the JSON files in `proved` beside this file, which `python -m bench.gpu` writes) or this machine's
own (hardware.json in the cache folder), which count first. On a GPU without one, a kernel's first use checks it against
float64 (self_check.py: seconds, nearly all of them spent in the compiler, once for each GPU and version) and keeps the
answer. GCI_SELF_CHECK=0 keeps unproved kernels off without checking; `gci-kernels verify --device cuda` checks all of
them again.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import threading
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from gci_kernels import native
from gci_kernels.files import cache_dir, write_whole
from gci_kernels.hardware import self_check
from gci_kernels.hardware.gpus import device_capability
from gci_kernels.hardware.kernels import KERNELS, get, names

_PACKAGE = Path(__file__).parents[1]
_LOCK = threading.RLock()
# (kernel, the GPU's index) -> what this process read or found out; asked at every call of an op.
_answers: dict[tuple[str, int], bool] = {}
#: Increased whenever a proof changes: plans that depend on an earlier version have to be made again.
version = 0


@dataclass(frozen=True)
class Record:
    """What one kernel did on one GPU. `source`, the file it stands in, is not written."""

    gpu: str
    capability: str  # "sm_90", "gfx942"
    compiler: str  # "triton 3.6.0", "nvcc 13.0"
    kernel: str
    digest: str
    passed: bool
    reason: str  # why not; empty where it passed
    when: str  # UTC, to the second
    source: str = ""

    def as_json(self) -> dict[str, str | bool]:
        """What is written."""
        return {name: value for name, value in vars(self).items() if name != "source"}

    def __str__(self) -> str:
        verdict = "proved" if self.passed else f"failed: {self.reason}"
        return f"{verdict} ({self.source or 'not kept'}, {self.when[:10]})"


def missing(kernel: str) -> str:
    """Why there is no such kernel here, whatever the GPU; empty where there is one."""
    if get(kernel).language != "cuda" or native.CUDA_DIGEST:
        return ""
    return native.CUDA_BUILD if native.available() else f"not built: {native.why_unavailable()}"


@functools.cache
def digest(kernel: str) -> str:
    """sha256 over the kernel's source files, names included; in CUDA C++ over what the extension was built from too."""
    declared = get(kernel)
    total = hashlib.sha256(native.CUDA_DIGEST.encode() if declared.language == "cuda" else b"")
    for name in declared.files:
        total.update(name.encode() + b"\0" + (_PACKAGE / name).read_bytes() + b"\0")
    return total.hexdigest()


@functools.cache
def triton_version() -> str:
    """The installed Triton's."""
    return importlib.metadata.version("triton")


def compiler(kernel: str) -> str:
    """What compiles, or has compiled, the kernel here, with its version."""
    return native.CUDA_COMPILER if get(kernel).language == "cuda" else f"triton {triton_version()}"


def gpu(device: torch.device) -> tuple[str, str]:
    """The GPU's name, and the compiler's name of its chip."""
    return torch.cuda.get_device_name(device), device_capability(device)


def make_record(kernel: str, device: torch.device, passed: bool, reason: str = "") -> Record:
    """The record of `kernel` as it is now, on `device`."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Record(*gpu(device), compiler(kernel), kernel, digest(kernel), passed, reason, now)


# Where records are kept


@functools.cache
def warn_once(message: str) -> None:
    """RuntimeWarning, the first time in a process."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def shipped_folder() -> Path:
    """Where the records are that come with the package: JSON files with a section "proved"."""
    return Path(__file__).parent / "proved"


@functools.cache
def shipped() -> tuple[Record, ...]:
    """The records that came with this version."""
    return tuple(record for path in sorted(shipped_folder().glob("*.json")) for record in _read(path))


def own_path() -> Path:
    """The file of the records that this machine made; it may not exist."""
    return cache_dir() / "hardware.json"


@functools.cache
def _own(path: Path) -> tuple[Record, ...]:
    return _read(path)


def own() -> tuple[Record, ...]:
    """The records that this machine made."""
    return _own(own_path())


def _read(path: Path) -> tuple[Record, ...]:
    """The section "proved" of a JSON file; nothing where it has none, or where the file is damaged (warned of once)."""
    if not path.exists():
        return ()
    try:
        return tuple(Record(**entry, source=str(path)) for entry in json.loads(path.read_text()).get("proved", ()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warn_once(f"gci_kernels: {path} could not be read and counts as empty: {error}")
        return ()


def keep(*records: Record) -> None:
    """Write this machine's records, each in place of what was kept of its kernel on its GPU; a warning on failure."""
    path = own_path()
    with _LOCK:
        replaced = {(record.kernel, record.gpu, record.capability) for record in records}
        others = [old for old in _read(path) if (old.kernel, old.gpu, old.capability) not in replaced]
        content = {"proved": [record.as_json() for record in (*others, *records)]}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(content, indent=1))
        except OSError as error:
            warn_once(f"gci_kernels: {path} could not be written, so kernels are checked again next time: {error}")
        _own.cache_clear()
        for key in [key for key in _answers if key[0] in {record.kernel for record in records}]:
            del _answers[key]
        global version
        version += 1


# What "auto" asks


def find(kernel: str, device: torch.device) -> Record | None:
    """The record that counts for `kernel`, as it is now, on `device`: this machine's own, else a shipped one."""
    name, capability = gpu(device)
    wanted = (name, capability, compiler(kernel), kernel, digest(kernel))
    for record in (*own(), *shipped()):
        if (record.gpu, record.capability, record.compiler, record.kernel, record.digest) == wanted:
            return record
    return None


def state(kernel: str, device: torch.device) -> str:
    """One of "proved", "failed" and, where no record counts, "unproved"; nothing is run."""
    record = find(kernel, device)
    return "unproved" if record is None else "proved" if record.passed else "failed"


def _current_index() -> int | None:
    """None without a GPU. is_available, which is slow, is called only until CUDA is initialised."""
    usable = torch.cuda.is_initialized() or torch.cuda.is_available()
    return torch.cuda.current_device() if usable else None


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


# Dynamo asks when it traces, and the answer is a constant of the compiled function.
@torch.compiler.assume_constant_result
def proves(kernel: str, device: torch.device | None = None) -> bool:
    """Whether "auto" may take `kernel` on `device` (None: the current GPU); its first use may run the self check."""
    index = _current_index() if device is None or device.index is None else device.index
    if index is None:
        return False
    answer = _answers.get((kernel, index))
    return _ask(kernel, index) if answer is None else answer


def settled(kernels: Iterable[str]) -> int | None:
    """The current GPU's index where :func:`proves` has given a lasting answer for all of `kernels`; else None."""
    index = _current_index()
    return index if all((kernel, index) in _answers for kernel in kernels) else None


def _ask(kernel: str, index: int) -> bool:
    device = torch.device("cuda", index)
    with _LOCK:
        if missing(kernel):
            _answers[kernel, index] = False
            return False
        record = find(kernel, device)
        if record is None:
            # Launches during a capture would become part of the graph. Neither answer is kept: both are for now.
            if os.environ.get("GCI_SELF_CHECK") == "0" or _capturing():
                return False
            record = renew(kernel, device)
        _answers[kernel, index] = record.passed
        return record.passed


def renew(kernel: str, device: torch.device) -> Record:
    """Check `kernel` on `device` now, keep the answer among this machine's records, and warn where it failed."""
    passed, reason, lasting = _self_check(kernel, device)
    record = make_record(kernel, device, passed, reason)
    if lasting:
        keep(record)
    if not passed:
        warn_once(
            f"gci_kernels: the GPU kernel {kernel!r} failed its check on {record.gpu} and is left out: {reason}. "
            "`gci-kernels verify --device cuda` checks it again"
        )
    return record


def renew_all(device: torch.device, whole_op_failure: str | None = None) -> list[Record]:
    """Check every kernel that there is on `device` now and keep the answers.

    `whole_op_failure`: a case in which all Triton kernels together failed; then none of them is proved, for any may be
    the cause.
    """
    records = [renew(kernel, device) for kernel in KERNELS if not missing(kernel)]
    if whole_op_failure is not None:
        reason, affected = f"the whole op failed: {whole_op_failure}", names("triton")
        for i, record in enumerate(records):
            if record.passed and record.kernel in affected:
                records[i] = dataclasses.replace(record, passed=False, reason=reason)
        keep(*records)
    return [dataclasses.replace(record, source=str(own_path())) for record in records]


def _self_check(kernel: str, device: torch.device) -> tuple[bool, str, bool]:
    """Whether it passed, why not, and whether that says something about the kernel.

    In a thread of its own, where nothing of the caller's is in force: no autocast, inference mode, fake tensors,
    default device or tracing, and another current stream.
    """

    def check() -> tuple[bool, str, bool]:
        try:
            with torch.no_grad(), torch.cuda.device(device):
                failed = [c for c in self_check.check_kernel(kernel, device) if not c.passed]
        except torch.OutOfMemoryError as error:
            return False, f"no memory for the check: {_first_line(error)}", False
        except Exception as error:  # whatever it is, a kernel that raises is not to be used
            return False, f"{type(error).__name__}: {_first_line(error)}", True
        if not failed:
            return True, "", True
        case = f"{failed[0].case} {failed[0].dtype} {failed[0].tensor}"
        errors = f"error {failed[0].error:.1e}, allowed {failed[0].bound:.1e}"
        return False, f"{len(failed)} checks, first {case}: {errors}", True

    with ThreadPoolExecutor(1, f"gci_kernels check of {kernel}") as thread:
        return thread.submit(check).result()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
