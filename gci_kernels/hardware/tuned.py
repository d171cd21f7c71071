"""Launch configurations that `gci-kernels tune` found faster on this machine's GPU, in place of the chosen ones.

Nothing is tuned while a model runs. A file in the cache folder, tuned.json, holds what tuning found; an entry counts
for one GPU, one Triton and the kernel's source as it was then. Without one, the launch's own `choose` decides.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gci_kernels.files import cache_dir, cache_error, make_cache_dir, write_whole
from gci_kernels.hardware import records
from gci_kernels.hardware.kernels import LAUNCHES, get_launch
from gci_kernels.hardware.self_check import DTYPES

Request = tuple[str, tuple[object, ...]]
_trying: dict[str, Any] = {}
_requests: list[Request] | None = None


def config(launch: str, device: torch.device, *arguments: object) -> Any:
    """The configuration of a registered launch on `device`, for the arguments of its `choose`."""
    if _requests is not None:
        _requests.append((launch, arguments))
    if launch in _trying:
        return _trying[launch]
    if device.type == "cuda":
        found = _table(path(), torch.cuda.current_device() if device.index is None else device.index)
        if (launch, arguments) in found:
            return found[launch, arguments]
    return get_launch(launch)[1].choose(*arguments)


@contextlib.contextmanager
def trying(launch: str, candidate: object) -> Iterator[None]:
    """:func:`config` returns `candidate` for `launch` meanwhile, whatever the arguments."""
    _trying[launch] = candidate
    try:
        yield
    finally:
        del _trying[launch]


@contextlib.contextmanager
def requests() -> Iterator[list[Request]]:
    """Collects the (launch, arguments) that :func:`config` is called with meanwhile."""
    global _requests
    _requests = []
    try:
        yield _requests
    finally:
        _requests = None


def path() -> Path:
    """The file of this machine's tuned configurations; it may not exist."""
    return cache_dir() / "tuned.json"


def keep(launch: str, arguments: tuple[object, ...], best: Any, device: torch.device) -> None:
    """Write the configuration that is best for `launch` on `device`, in place of an older one for the same arguments.

    Raises:
        CacheError: the cache folder can't be written.
    """
    written = [str(value) if isinstance(value, torch.dtype) else value for value in arguments]
    entry = _stamp(launch, device) | {"arguments": written, "config": dataclasses.asdict(best)}
    others = [old for old in _entries(path()) if any(old.get(key) != entry[key] for key in entry if key != "config")]
    make_cache_dir()
    try:
        write_whole(path(), json.dumps({"tuned": [*others, entry]}, indent=1))
    except OSError as error:
        raise cache_error(error) from error
    _table.cache_clear()


@functools.cache
def _table(file: Path, index: int) -> dict[Request, Any]:
    device, table = torch.device("cuda", index), {}
    dtypes = {str(dtype): dtype for dtype in DTYPES}
    for entry in _entries(file):
        name = entry.get("launch")  # an earlier version wrote other keys
        if name not in LAUNCHES or not _stamp(name, device).items() <= entry.items():
            continue
        try:
            arguments = tuple(dtypes.get(value, value) for value in entry["arguments"])
            table[name, arguments] = LAUNCHES[name][1].config_class(**entry["config"])
        except (KeyError, TypeError) as error:
            records.warn_once(f"gci_kernels: {file}: an entry of {name} is not whole and is left out: {error!r}")
    return table


def _stamp(launch: str, device: torch.device) -> dict[str, Any]:
    """What an entry counts for."""
    name, capability = records.gpu(device)
    source = records.digest(get_launch(launch)[0].name)
    return dict(launch=launch, gpu=name, capability=capability, triton=records.triton_version(), digest=source)


def _entries(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        return json.loads(file.read_text())["tuned"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        records.warn_once(f"gci_kernels: {file} could not be read, so nothing is taken as tuned: {error}")
        return []
