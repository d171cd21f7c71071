"""What long work shows: lines in a file, a bar on a terminal, and how long it still takes in both."""

import sys

import pytest

from gci_kernels import progress
from gci_kernels.progress import bar


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time, which the test sets."""
    value = [0.0]
    monkeypatch.setattr("gci_kernels.progress.time.monotonic", lambda: value[0])
    return value


def test_a_file_gets_a_line_for_each_step_and_seldom_more(now, capsys) -> None:
    with bar("reading", 10) as shown:
        for second in range(1, 26):
            now[0] = float(second)
            shown.advance(0.2, f"part {second}")
        shown.step("writing")
        shown.step("writing", "much")
        shown.print("a line of its own, " * 9)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "reading  [0%, 0 s]",
        "reading: part 10  [20%, 10 s, about 40 s left]",
        "reading: part 20  [40%, 20 s, about 30 s left]",
        "writing  [50%, 25 s, about 25 s left]",
        "a line of its own, " * 9,
    ]


def test_the_time_left_is_never_more_than_the_limit(now) -> None:
    with bar("work", 4, limit=100.0, shown=False) as shown:
        assert shown.times() == "0 s, at most 1:40 left"
        now[0] = 30.0
        shown.advance()
        assert shown.times() == "30 s, about 1:10 left"
        now[0] = 60.0
        shown.advance(2)
        assert shown.times() == "1:00, about 20 s left"
        shown.limit(5.0)
        assert shown.times() == "1:00, about 5 s left"
        now[0] = 90.0
        assert shown.times() == "1:30, about 30 s left"  # three quarters are done, the limit has passed


def test_what_was_done_before_says_nothing_about_the_speed(now) -> None:
    with bar("work", 10, completed=8, shown=False) as shown:
        now[0] = 60.0
        assert shown.times() == "1:00" and shown.amount() == "80%"
        shown.advance()
        assert shown.times() == "1:00, about 1:00 left"


def test_a_terminal_gets_one_line_that_goes_again(monkeypatch, capsys) -> None:
    real = progress.Console
    monkeypatch.setattr(progress, "Console", lambda **options: real(**options, force_terminal=True, width=100))
    with bar("copying", 4 << 20, in_bytes=True) as shown:
        shown.advance(2 << 20, "the second half")
        shown._live.refresh()
    err = capsys.readouterr().err
    assert "copying: the second half" in err and "2.1 MB of 4.2 MB, 0 s" in err and "\x1b[2K" in err


def test_silence(capsys) -> None:
    with bar("copying", 2, shown=False) as shown:
        shown.advance()
    assert capsys.readouterr().err == ""


def test_an_error_goes_through(capsys) -> None:
    with pytest.raises(KeyboardInterrupt), bar("copying", 2):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "copying  [0%, 0 s]\n" and sys.stderr is not None


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0 s"), (59.6, "1:00"), (75, "1:15"), (3700, "1:01:40")])
def test_clock(seconds: float, shown: str) -> None:
    assert progress.clock(seconds) == shown
