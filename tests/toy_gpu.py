"""What tests of an imagined GPU share; its fixtures are in conftest.py."""

import io
import json
from pathlib import Path

import torch
from rich.console import Console

from gci_kernels import hardware
from gci_kernels.hardware import proving, records
from gci_kernels.proof import info

GPU = torch.device("cuda", 0)
ALL = frozenset(hardware.KERNELS)
#: A kernel that is slower than the library for 128 tokens, and faster for 1,024.
TIMES = {"forward": [(128, 1e-5, 2e-5), (1024, 4e-5, 3e-5)]}


def forget() -> None:
    """As if the process had just begun."""
    for found in (records.proofs, records.starts, proving._not_before):
        found.clear()
    for cached in (records.shipped, records._own, records.warn_once, records.digest):
        cached.cache_clear()


def ship(tmp_path: Path, *records: hardware.Record) -> None:
    """As if these records came with the package, beside a file without any."""
    (tmp_path / "proved").mkdir()
    content = {"schema": 1, "proved": [record.as_json() for record in records]}
    (tmp_path / "proved" / "imagined.json").write_text(json.dumps(content))
    (tmp_path / "proved" / "cpu.json").write_text('{"schema": 1}')


def shown(monkeypatch, gpus: int, get_device_name=lambda device: "Imagined 1000") -> str:
    """What `gci-kernels info` prints on a machine with so many of them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", get_device_name)
    console = Console(width=200, file=io.StringIO())
    info.show(console)
    return console.file.getvalue()
