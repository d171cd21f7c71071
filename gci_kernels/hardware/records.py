"""What is known of kernels on GPUs: records, shipped and of this machine.

A record says that one kernel, as its source files are now, passed or failed its tests on one GPU with one compiler,
and, where that was measured, how long it and the library take. It is of the whole kernel or of one variant: a dtype of
x, with or without dropout. Records are shipped (the JSON files in `proved` beside this file, which `python -m
bench.gpu` writes) or this machine's own (hardware.json in the cache folder), which count first. proving.py makes them.
"""

import functools
import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from gci_kernels import native
from gci_kernels.files import cache_dir, write_whole
from gci_kernels.hardware.gpus import device_capability
from gci_kernels.hardware.kernels import get
from gci_kernels.hardware.locking import alone

_PACKAGE = Path(__file__).parents[1]
Key = tuple[str, torch.dtype, bool, int]
#: What proving.py has found out in this process, by kernel, dtype of x, with dropout or not, and the GPU's index:
#: whether the kernel is proved, and from how many tokens it is taken. A new record of the kernel clears both.
proofs: dict[Key, bool] = {}
starts: dict[Key, int | None] = {}

#: Stage -> [tokens, the library's seconds, the kernel's seconds] for each number of tokens that was timed.
Times = dict[str, list[tuple[int, float, float]]]


@dataclass(frozen=True)
class Record:
    """What one kernel did on one GPU. `source`, the file that it is in, is not written."""

    gpu: str
    capability: str  # "sm_90", "gfx942"
    compiler: str  # "triton 3.6.0", "nvcc 13.0"
    kernel: str
    digest: str
    passed: bool
    reason: str  # why not; empty where it passed
    when: str  # UTC, to the second
    source: str = ""
    variant: str = ""  # see variant_of; empty: all of them
    times: Times = field(default_factory=dict)  # empty: not timed

    def as_json(self) -> dict[str, Any]:
        """What is written."""
        return {name: value for name, value in vars(self).items() if name != "source"}

    @property
    def start(self) -> int | None:
        """The fewest tokens from which the kernel was no slower than the library, over all its stages; None: never."""
        gains: dict[int, float] = {}
        for measured in self.times.values():
            for tokens, library, kernel in measured:
                gains[tokens] = gains.get(tokens, 0.0) + library - kernel
        start = None
        for tokens in sorted(gains, reverse=True):
            if gains[tokens] < 0:
                break
            start = tokens
        return start

    def __str__(self) -> str:
        verdict = "proved" if self.passed else f"failed: {self.reason}"
        if self.passed and self.times:
            verdict += ", slower than the library" if self.start is None else f", used from {self.start} tokens"
        return f"{verdict} ({self.source or 'not kept'}, {self.when[:10]})"


def variant_of(kernel: str, dtype: torch.dtype, dropout: bool) -> str:
    """A record's name of the variant of `kernel` for x in `dtype`: "bfloat16", "bfloat16 with dropout"."""
    masked = dropout and get(kernel).check_dropout is not None
    return str(dtype).removeprefix("torch.") + (" with dropout" if masked else "")


def missing(kernel: str) -> str:
    """Why there is no such kernel here, whatever the GPU; empty where there is one."""
    if get(kernel).language != "cuda":
        return ""
    if native.CUDA_DIGEST:
        return native.driver_obstacle()
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


def make_record(
    kernel: str, device: torch.device, passed: bool, reason: str = "", variant: str = "", times: Times | None = None
) -> Record:
    """The record of `kernel` as it is now, on `device`."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    name, chip = gpu(device)
    return Record(
        name, chip, compiler(kernel), kernel, digest(kernel), passed, reason, now, variant=variant, times=times or {}
    )


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


def reread() -> None:
    """Read this machine's records again when they are next asked for: another process may have written some."""
    _own.cache_clear()


def _read(path: Path) -> tuple[Record, ...]:
    """The section "proved" of a JSON file; nothing where it has none, or where the file is damaged (warned of once)."""
    if not path.exists():
        return ()
    try:
        found = tuple(Record(**entry, source=str(path)) for entry in json.loads(path.read_text()).get("proved", ()))
        for record in found:
            _ = record.start  # raises where its times are none
        return found
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warn_once(f"gci_kernels: {path} could not be read and counts as empty: {error}")
        return ()


def keep(*records: Record) -> None:
    """Write this machine's records, each in place of what was kept of its variant on its GPU; a warning on failure.

    A record of a whole kernel takes the place of those of its variants, except for times that still count.
    """
    path = own_path()
    with alone(path.with_suffix(".lock")):  # nothing of what another process writes at the same time is lost
        others = [old for old in _read(path) if not any(_replaces(record, old) for record in records)]
        content = {"proved": [record.as_json() for record in (*others, *records)]}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(content, indent=1))
        except OSError as error:
            warn_once(f"gci_kernels: {path} could not be written, so kernels are checked again next time: {error}")
    reread()
    changed = {record.kernel for record in records}
    for found in (proofs, starts):
        for key in [key for key in found if key[0] in changed]:
            found.pop(key, None)


def _replaces(record: Record, old: Record) -> bool:
    same = (record.kernel, record.gpu, record.capability) == (old.kernel, old.gpu, old.capability)
    if record.variant or not same:
        return same and record.variant == old.variant
    still_counts = record.passed and old.passed and (record.digest, record.compiler) == (old.digest, old.compiler)
    return not (old.times and old.variant and still_counts)


def find(kernel: str, device: torch.device, variant: str = "") -> Record | None:
    """The record that counts for a variant of `kernel`, as it is now, on `device`; "" is all variants together.

    This machine's own, else a shipped one; of each the variant's, else that of the whole kernel.
    """
    for records in (own(), shipped()):
        for name in dict.fromkeys((variant, "")):
            found = next((record for record in counting(kernel, device, records) if record.variant == name), None)
            if found is not None:
                return found
    return None


def counting(kernel: str, device: torch.device, records: Iterable[Record]) -> Iterator[Record]:
    """Those of `records` that are of `kernel`, as it is now, on such a GPU as `device`, with this compiler."""
    wanted = (*gpu(device), compiler(kernel), kernel, digest(kernel))
    for record in records:
        if (record.gpu, record.capability, record.compiler, record.kernel, record.digest) == wanted:
            yield record
