"""Instructions and pairs from files that users write, in which single lines may be invalid."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from gci_kernels.rega.prompts import require_text

INSTRUCTION = ("instruction", "prompt")
ANSWER = ("answer", "completion", "response")
DISTILLED = "gci_kernels.rega.distilled"  # the beginning of the format in the first line of distill's files
T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """An instruction and its answer."""

    instruction: str
    answer: str


class Problem(NamedTuple):
    """The number of a line that was skipped, from 1, and the reason."""

    line: int
    message: str


def read_instructions(path: str | os.PathLike) -> tuple[list[str], list[Problem]]:
    """The instructions in a file, one a line, and the invalid lines. Empty lines are ignored.

    Args:
        path: .jsonl: a JSON string a line, or an object with "instruction", "prompt", or "messages", whose first user
            turn is taken. Any other name: a text file, an instruction a line.

    Raises:
        ValueError: no line is valid.
        OSError: the file can't be read.
    """
    path = Path(path)
    return _read(path, _instruction if path.suffix == ".jsonl" else _plain)


def read_pairs(path: str | os.PathLike) -> tuple[list[Pair], list[Problem]]:
    """The pairs in a .jsonl file, and the invalid lines. Empty lines are ignored.

    Args:
        path: an object a line: "instruction" or "prompt" beside "answer", "completion" or "response", all strings; or
            "messages", of which the first user turn and the assistant's next one are taken.

    Raises:
        ValueError: no line is valid, or distill has written the file: :func:`.read_distilled` reads it.
        OSError: the file can't be read.
    """
    path = Path(path)
    if is_distilled(path):
        raise ValueError(f"{path} is a file of distilled answers: read it with read_distilled")
    return _read(path, _pair)


def is_distilled(path: str | os.PathLike) -> bool:
    """Whether the file's first line is that of distill's files."""
    with Path(path).open("rb") as file:
        first = file.readline(4096)
    return first.startswith(b"{") and f'"{DISTILLED} '.encode() in first


def _read(path: Path, parse: Callable[[str], T]) -> tuple[list[T], list[Problem]]:
    found: list[T] = []
    problems: list[Problem] = []
    for number, line in _lines(path):
        try:
            found.append(parse(line))
        except ValueError as error:
            problems.append(Problem(number, str(error)))
    if not found:
        first = f"; line {problems[0].line}: {problems[0].message}" if problems else ""
        raise ValueError(f"{path} holds no line that can be used{first}")
    return found, problems


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, by number. Only line feeds end a line: a text may contain other line breaks."""
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _plain(line: str) -> str:
    return require_text("the line", _utf8(line).strip())


def _instruction(line: str) -> str:
    value = _json(line)
    if isinstance(value, str):
        return require_text("the instruction", value)
    if not isinstance(value, dict):
        raise ValueError("must be a string or an object")
    if "messages" in value:
        return _turn(value["messages"], "user", 0)[1]
    return _field(value, INSTRUCTION)


def _pair(line: str) -> Pair:
    value = _json(line)
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    if "messages" not in value:
        return Pair(_field(value, INSTRUCTION), _field(value, ANSWER))
    index, instruction = _turn(value["messages"], "user", 0)
    return Pair(instruction, _turn(value["messages"], "assistant", index + 1)[1])


def _utf8(line: str) -> str:
    if any("\udc80" <= character <= "\udcff" for character in line):
        raise ValueError("not UTF-8")
    return line


def _json(line: str) -> Any:
    try:
        return json.loads(_utf8(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: nested too deeply") from error


def _field(value: dict, names: tuple[str, ...]) -> str:
    name = next((name for name in names if name in value), None)
    if name is None:
        raise ValueError(f"has no {', '.join(names[:-1])} or {names[-1]}")
    return require_text(name, value[name])


def _turn(turns: object, role: str, start: int) -> tuple[int, str]:
    """The index and text of the first turn of `role` at `start` or later."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("messages must be a list of objects with role and content")
    for index, turn in enumerate(turns[start:], start):
        if turn.get("role") == role:
            return index, require_text(f"the {role}'s content", turn.get("content"))
    raise ValueError(f"messages has no {role}'s turn{' after the user' if start else ''}")
