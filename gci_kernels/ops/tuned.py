"""Launch configurations that `gci-kernels tune` found faster on this machine's GPU, in place of the chosen ones.

Nothing is tuned while a model runs. A file in the cache folder, tuned.json, holds what tuning found; an entry counts
for one GPU, one Triton and the kernel's source as it was then. Without one, ops/triton_config.py chooses.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from gci_kernels import hardware
from gci_kernels.files import cache_dir, cache_error, make_cache_dir, write_whole
from gci_kernels.ops import triton_config

#: kernel -> the configuration's class. project_reduce is part of what hardware.py calls "reduce".
CLASSES = {
    "project": triton_config.ProjectConfig,
    "expand": triton_config.ExpandConfig,
    "reduce": triton_config.ReduceConfig,
    "project_reduce": triton_config.ProjectReduceConfig,
    "row_linear": triton_config.RowLinearConfig,
}
_trying: dict[str, object] = {}
_asked: list[tuple[str, tuple]] | None = None


def config(kernel: str, device: torch.device, *arguments: object):
    """The configuration of `kernel` for `arguments`, those of triton_config.choose_<kernel>_config, on `device`."""
    if _asked is not None:
        _asked.append((kernel, arguments))
    if kernel in _trying:
        return _trying[kernel]
    if device.type == "cuda":
        found = _table(path(), torch.cuda.current_device() if device.index is None else device.index)
        if (kernel, arguments) in found:
            return found[kernel, arguments]
    return getattr(triton_config, f"choose_{kernel}_config")(*arguments)


@contextlib.contextmanager
def trying(kernel: str, candidate: object) -> Iterator[None]:
    """`candidate` is what :func:`config` answers for `kernel`, whatever the arguments."""
    _trying[kernel] = candidate
    try:
        yield
    finally:
        del _trying[kernel]


@contextlib.contextmanager
def asked() -> Iterator[list[tuple[str, tuple]]]:
    """Collects the (kernel, arguments) that :func:`config` is asked for."""
    global _asked
    _asked = []
    try:
        yield _asked
    finally:
        _asked = None


def path() -> Path:
    return cache_dir() / "tuned.json"


def keep(kernel: str, arguments: tuple, best: object, device: torch.device) -> None:
    """Write what was found for `kernel` on `device`, in place of what was kept for the same arguments."""
    entry = _stamp(kernel, device) | {"arguments": _plain(arguments), "config": dataclasses.asdict(best)}
    others = [old for old in _entries(path()) if any(old[key] != entry[key] for key in entry if key != "config")]
    make_cache_dir()
    try:
        write_whole(path(), json.dumps({"tuned": [*others, entry]}, indent=1))
    except OSError as error:
        raise cache_error(error) from error
    _table.cache_clear()


@functools.cache
def _table(file: Path, index: int) -> dict[tuple[str, tuple], object]:
    device, table = torch.device("cuda", index), {}
    for entry in _entries(file):
        kernel = entry["kernel"]
        if kernel in CLASSES and _stamp(kernel, device).items() <= entry.items():
            table[kernel, _lively(entry["arguments"])] = CLASSES[kernel](**entry["config"])
    return table


def _stamp(kernel: str, device: torch.device) -> dict[str, str]:
    name, capability = hardware.gpu(device)
    source = hardware.digest("reduce" if kernel == "project_reduce" else kernel)
    return dict(kernel=kernel, gpu=name, capability=capability, triton=hardware.triton_version(), digest=source)


def _entries(file: Path) -> list[dict]:
    if not file.exists():
        return []
    try:
        return json.loads(file.read_text())["tuned"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        hardware.warn_once(f"gci_kernels: {file} could not be read, so nothing is taken as tuned: {error}")
        return []


def _plain(arguments: tuple) -> list:
    return [str(value) if isinstance(value, torch.dtype) else value for value in arguments]


def _lively(arguments: list) -> tuple:
    """The arguments that :func:`_plain` wrote."""
    named = {str(dtype): dtype for dtype in triton_config.DTYPES}
    return tuple(named.get(value, value) if isinstance(value, str) else value for value in arguments)
