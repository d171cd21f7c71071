"""A plugin of pytest that writes each test's outcome to the log as it ends: `-p bench.gpu_pytest --line-log PATH`."""

from pathlib import Path

import pytest

from .gpu_log import Log


def pytest_addoption(parser: pytest.Parser) -> None:
    """--line-log."""
    parser.addoption("--line-log", type=Path, metavar="PATH", help="append a line of JSON for each test")


def pytest_configure(config: pytest.Config) -> None:
    """Listen to the reports where a log is named."""
    path = config.getoption("--line-log")
    if path is not None:
        config.pluginmanager.register(_Reports(Log(path), config.getoption("--kernel", default="")))


class _Reports:
    def __init__(self, log: Log, group: str) -> None:
        self.log, self.group = log, group

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A line once a test is decided: by its call, or before that by its set-up; a failed tear-down adds one."""
        if report.when == "call" or report.outcome != "passed":
            why = "" if report.passed else _first_line(report)
            test = report.nodeid.rpartition("::")[2]
            self.log.write(step="tests", group=self.group, test=test, outcome=report.outcome, why=why)


def _first_line(report: pytest.TestReport) -> str:
    """What it failed with, or why it was skipped."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return (text.strip().splitlines() or [""])[0][:300]
