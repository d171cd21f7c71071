"""The log of `python -m bench.gpu`: lines of JSON that several processes append to one file and one of them reads.

A line is written as soon as there is something to say, so that whatever ends the run leaves all that was found.
"""

import json
import time
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Log:
    """One process's way to the log."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self.path = path
        self._read = path.stat().st_size if from_end and path.exists() else 0

    def write(self, **line: object) -> None:
        """Append one line, whole; "at" is the time, in seconds since 1970."""
        text = json.dumps({"at": round(time.time(), 2), **line}) + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(text.encode())

    def new(self) -> list[Line]:
        """The whole lines since the last call; one that is no JSON object comes as {"damaged": text}."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        return [_parse(line.decode(errors="replace")) for line in whole.splitlines()]


def _parse(text: str) -> Line:
    try:
        line = json.loads(text)
    except ValueError:
        return {"damaged": text}
    return line if isinstance(line, dict) else {"damaged": text}
