"""The processes of `python -m bench.gpu`: side by side, ended in time, and no crash of one reaches another."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LOOK = 0.1  # seconds between two looks at the processes


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, None where it was ended or never started; why that is bad, else ""."""

    status: int | None
    trouble: str
    seconds: float


class Child:
    """A running process, the leader of a session of its own; what it prints goes to a file."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.began = time.monotonic()
        self._said = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=self._said, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def finished(self, *, good: tuple[int, ...] = (0,)) -> Ended:
        """The end of a process that has ended by itself."""
        status, trouble = self.process.returncode, ""
        if status not in good:
            trouble = f"its process ended with status {status}: {self.last_words()}"
        return Ended(status, trouble, self._seconds())

    def ended(self, why: str) -> Ended:
        """End the process, and all that it started, now."""
        end(self.process)
        return Ended(None, why, self._seconds())

    def last_words(self) -> str:
        """The last lines that it printed, as one; before them Python's word for a crash, which its stack follows."""
        self._said.seek(0)
        lines = [line.strip() for line in self._said.read()[-50_000:].splitlines() if line.strip()]
        fatal = [line for line in lines[:-3] if "Fatal Python error" in line]
        return " | ".join([*fatal[-1:], *lines[-3:]])[:600]

    def _seconds(self) -> float:
        return round(time.monotonic() - self.began, 1)


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a session of its own, and all that it started, where it is still running."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_all(
    commands: Mapping[str, Sequence[str]], *, at_once: int, stop: Callable[[], str],
    listen: Callable[[], None] = lambda: None, environments: Mapping[str, Mapping[str, str]] | None = None,
    good: tuple[int, ...] = (0,),
) -> dict[str, Ended]:  # fmt: skip
    """Run commands by name, so many side by side; returns how each ended.

    Args:
        stop: asked ten times a second; says why all that still runs is to be ended, "" to go on.
        listen: called as often, and once more after the last process has ended.
        environments: variables of some of the commands, beside this process's own.
        good: the exit statuses that are no trouble.
    """
    waiting, running, done = dict(commands), dict[str, Child](), dict[str, Ended]()
    why = ""
    try:
        while waiting or running:
            for name in list(waiting)[: at_once - len(running)]:
                running[name] = Child(waiting.pop(name), (environments or {}).get(name, {}))
            time.sleep(_LOOK)
            for name in [name for name, child in running.items() if child.process.poll() is not None]:
                done[name] = running.pop(name).finished(good=good)
            listen()
            why = stop()
            if why:
                break
    finally:
        for name, child in running.items():
            done[name] = child.ended(why or "the run was ended")
        listen()
    return done | {name: Ended(None, f"not started: {why}", 0.0) for name in waiting}
