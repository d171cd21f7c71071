"""Files of distilled answers: JSON lines, appended batch by batch, from which a killed run resumes.

The first line has the run's settings. Each line after it is one instruction's record, in order. A batch is written at
once and synced; where a kill leaves an incomplete batch, a resumed run computes that batch again.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gci_kernels.rega.instructions import DISTILLED, Pair
from gci_kernels.rega.prompts import RegaError

FORMAT = f"{DISTILLED} 1"
REASONS = (None, "empty", "repeated")
_FIELDS = {"index": int, "instruction": str, "answer": str, "seed": int, "tokens": int, "finished": bool}


def _line(value: dict) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


class DistilledFile:
    """A file open for writing. Use as a context manager.

    Args:
        path: the file; continued if it exists and belongs to the same run, else created.
        header: the settings that the answers depend on.
        instructions: all instructions of the run.
        seeds: the seed of each instruction.
        batch: how many instructions are answered at a time.

    Attributes:
        records: the records of finished batches.

    Raises:
        RegaError: the file exists and is another run's, damaged, or of another format. It is not changed.
    """

    def __init__(self, path: Path, header: dict, instructions: Sequence[str], seeds: Sequence[int], batch: int) -> None:
        self.records: list[dict] = []
        first, size = _line({"format": FORMAT, **header}), 0
        data = path.read_bytes() if path.exists() else b""
        if not first.startswith(data):  # else a run was killed before its first line was complete
            found, records = _parse(path, data)
            _check_header(path, found, json.loads(first))
            _check_records(path, records, instructions, seeds)
            complete = len(records) if len(records) == len(instructions) else len(records) // batch * batch
            self.records, size = records[:complete], sum(len(_line(r)) for r in records[:complete]) + len(first)
        self._file = path.open("r+b" if path.exists() else "x+b")
        self._file.truncate(size)
        self._file.seek(size)
        if not size:
            self._write(first)

    def __enter__(self) -> "DistilledFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, records: list[dict]) -> None:
        """Append a batch's records."""
        self._write(b"".join(map(_line, records)))
        self.records += records

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())


def _parse(path: Path, data: bytes) -> tuple[dict, list[dict]]:
    """The header and the records; an incomplete last line is left out."""
    values = []
    for number, text in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise _damaged(path, number) from error
        # Byte for byte as it was written, so that the records' offsets in the file are known, too.
        if not isinstance(value, dict) or _line(value) != text + b"\n":
            raise _damaged(path, number)
        values.append(value)
    if not values or values[0].get("format") != FORMAT:
        raise RegaError(f"{path} is no file of distilled answers of this version: choose another name")
    for number, record in enumerate(values[1:], start=2):
        if not _is_record(record, number - 2):
            raise _damaged(path, number)
    return values[0], values[1:]


def _is_record(record: dict, index: int) -> bool:
    return (
        set(record) == {*_FIELDS, "dropped"}
        and all(type(record[name]) is kind for name, kind in _FIELDS.items())
        and record["index"] == index
        and record["dropped"] in REASONS
    )


def _damaged(path: Path, number: int) -> RegaError:
    return RegaError(f"{path} is damaged in line {number}: delete it to begin again")


def _check_header(path: Path, found: dict, wanted: dict) -> None:
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    other = [f"{name} {found.get(name)!r:.60}, not {wanted.get(name)!r:.60}" for name in names]
    if other:
        raise RegaError(f"{path} is another run's: it has {'; '.join(other)}. Delete it or choose another name")


def _check_records(path: Path, records: list[dict], instructions: Sequence[str], seeds: Sequence[int]) -> None:
    for index, record in enumerate(records):
        if index >= len(instructions) or (record["instruction"], record["seed"]) != (instructions[index], seeds[index]):
            raise _damaged(path, index + 2)


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All records of a finished file, including the dropped ones.

    Raises:
        RegaError: the file is missing, unfinished, damaged or of another format.
    """
    path = Path(path)
    if not path.exists():
        raise RegaError(f"{path} does not exist")
    header, records = _parse(path, path.read_bytes())
    if len(records) != header.get("count"):
        raise RegaError(f"{path} is unfinished: {len(records)} of {header.get('count')} answers; run distill again")
    return records


def kept(records: Sequence[dict]) -> list[Pair]:
    """The pairs of the records that were not dropped, in order."""
    return [Pair(record["instruction"], record["answer"]) for record in records if record["dropped"] is None]


def read_distilled(path: str | os.PathLike) -> list[Pair]:
    """The pairs in a file that :func:`.distill` has written, without those that were dropped.

    Raises:
        RegaError: as :func:`read_records`.
    """
    return kept(read_records(path))
