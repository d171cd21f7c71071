"""Progress of long work on stderr: a live bar on a terminal; in a file or a pipe, a plain line every few seconds."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn
from rich.text import Text

#: Seconds between two lines about the same step, where stderr is not a terminal.
LINE_EVERY = 10.0


class Bar:
    """Progress of one piece of work; made by :func:`bar`.

    The time left is what the rest takes at the speed so far, and at most what is left of `limit` seconds, unless these
    have passed.

    Attributes:
        text: what is done now.
        total, completed: the amount of work, and how much of it is done, in pieces or bytes.
    """

    def __init__(
        self, text: str, total: float, completed: float, limit: float | None, in_bytes: bool, shown: bool
    ) -> None:
        self.text, self.total, self.completed = text, total, completed
        self._first, self._in_bytes, self._shown = completed, in_bytes, shown
        self._console = Console(stderr=True)
        self._begun = time.monotonic()
        self._end = None if limit is None else self._begun + limit
        self._last_line = -LINE_EVERY
        self._live: Progress | None = None

    def step(self, text: str, detail: str = "") -> None:
        """Shows what is done now; a new `text` is printed at once, a new `detail` with the next line."""
        new, self.text = text != self.text, text
        self._show(f"{text}: {detail}" if detail else text, now=new)

    def advance(self, amount: float = 1, detail: str = "") -> None:
        """Adds `amount` to what is done."""
        self.reach(self.completed + amount, detail)

    def reach(self, completed: float, detail: str = "") -> None:
        """Sets how much of the total is done."""
        self.completed = min(self.total, completed)
        self.step(self.text, detail)

    def limit(self, seconds: float) -> None:
        """Sets the most that the rest takes: `seconds` from now."""
        self._end = time.monotonic() + seconds

    def print(self, message: str) -> None:
        """Prints a line that stays above the bar."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def times(self) -> str:
        """The time since the beginning and, where it can be estimated, the time left, as text."""
        now = time.monotonic()
        spent, done = now - self._begun, self.completed - self._first
        guesses = [self._end - now] if self._end is not None and self._end > now else []
        if done > 0:
            guesses.append(spent * (self.total - self.completed) / done)
        word = "about" if done > 0 else "at most"
        return clock(spent) + (f", {word} {clock(min(guesses))} left" if guesses else "")

    def amount(self) -> str:
        """How much of the total is done, as text."""
        if self._in_bytes:
            return f"{decimal(int(self.completed))} of {decimal(int(self.total))}"
        return f"{self.completed / self.total:.0%}" if self.total else "100%"

    def _show(self, text: str, now: bool) -> None:
        if self._live is not None:
            self._live.update(self._live.task_ids[0], description=text, completed=self.completed)
        elif self._shown and (now or time.monotonic() - self._last_line >= LINE_EVERY):
            self._last_line = time.monotonic()
            self.print(f"{text}  [{self.amount()}, {self.times()}]")

    @contextlib.contextmanager
    def _open(self) -> Iterator["Bar"]:
        if not self._shown or not self._console.is_terminal:
            self._show(self.text, now=True)
            yield self
            return
        columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20), _Times(self)]
        with Progress(*columns, console=self._console, transient=True) as self._live:
            self._live.update(self._live.add_task(self.text, total=self.total), completed=self.completed)
            try:
                yield self
            finally:
                self._live = None


class _Times(TextColumn):
    """Amount and times in the words of the plain lines, so that a terminal and a file show the same text."""

    def __init__(self, bar: Bar) -> None:
        super().__init__("")
        self._bar = bar

    def render(self, task: Task) -> Text:
        return Text(f"{self._bar.amount()}, {self._bar.times()}")


def bar(
    text: str, total: float, *, completed: float = 0, limit: float | None = None, in_bytes: bool = False,
    shown: bool = True,
) -> contextlib.AbstractContextManager[Bar]:  # fmt: skip
    """A bar on stderr for work of `total` equal pieces; on a terminal it disappears at the end.

    Args:
        text: what is done now; :meth:`Bar.step` changes it.
        total: the amount of work.
        completed: how much of it was done before.
        limit: the seconds that all of it takes at most, where that is known.
        in_bytes: whether the pieces are bytes.
        shown: False for no output.
    """
    return Bar(text, total, completed, limit, in_bytes, shown)._open()


def clock(seconds: float) -> str:
    """A duration as text: 12 -> "12 s", 75 -> "1:15", 3700 -> "1:01:40"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
