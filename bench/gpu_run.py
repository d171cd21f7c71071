"""A run of `python -m bench.gpu`: its result, its log, the time that each step has, and the processes of a step."""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from gci_kernels import hardware, native
from gci_kernels.hardware import records
from gci_kernels.proof.verify import obstacle

from . import gpu_decode, gpu_report
from .gpu_log import Line, Log
from .gpu_processes import run_all
from .gpu_stages import Entry
from .machine import commit, gpu_software, machine, tools, versions, write_json

SCHEMA = 2
# A step stops between two cases when its time is up; its process is ended so many seconds later.
GRACE = 15
# A case from which nothing has come for so many seconds hangs: its process is ended, and another does the next cases.
SILENCE = 90
#: Exit statuses of a step's process: its time was up before its last case; a case left it without its GPU.
TIME_UP, LOST = 3, 4


class Run:
    """The result, which is written again with each entry, and the time that is left.

    Args:
        args: the command line.
        seconds: the steps in their order, and the share of args.limit_s that each may take. What a step leaves of its
            time is the next one's.
        entries: the names of lists of entries in the result.
        suffix: of the result's name.
    """

    def __init__(
        self, args: argparse.Namespace, seconds: Mapping[str, float], entries: tuple[str, ...], suffix: str = ""
    ) -> None:
        self.args, self.device, self.seconds = args, torch.device(args.device), seconds
        self.began, self.heard = time.monotonic(), time.monotonic()
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        no_triton = obstacle("triton", args.device, torch.bfloat16)
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            "machine": machine(self.device) | gpu_software(),
            "versions": versions(),
            "tools": tools(),
            "extension": extension(),
            "commit": commit() or {"sha": os.environ.get("GCI_COMMIT", "unknown"), "changed": None},
            "quick": args.quick,
            "left_out": ({"triton": no_triton} if no_triton else {}) | gpu_decode.reasons(self.device),
            "timing": "medians of interleaved rounds; stages and layers by CUDA events, with an empty L2 and the GPU "
            "busy until all is launched; slices and decode with their launches; all without an optimizer step",
            "proved": [], "tests": {}, **{name: [] for name in entries}, "steps": {}, "errors": {},
        }  # fmt: skip
        slug = re.sub(r"[^a-z0-9]+", "-", (self.result["machine"]["gpu"] or "cpu").lower()).strip("-")
        args.out.mkdir(parents=True, exist_ok=True)
        self.path = _unused(args.out, f"{slug}-{self.result['commit']['sha'][:10]}{suffix}")
        self.records_path = args.records / f"{slug}.json"
        self.log = Log(self.path.with_suffix(".jsonl"))
        self.begun: dict[str, list[str]] = {name: [] for name in entries}  # the cases that were begun, by step
        self.log.write(result={name: value for name, value in self.result.items() if value})
        self.write()

    def step(self, name: str, work: Callable[[float], None]) -> None:
        """Run `work` with the seconds that it may take; what it raises becomes part of the result."""
        begun = time.monotonic()
        limit = self.limit(name)
        if limit <= 0 and not self.seconds[name]:
            self.result["left_out"][name] = "it is for time that the other steps leave, and they left none"
        elif limit <= 0:
            self.fail(name, "left out: the time was up")
        else:
            self.log.write(step=name, limit=round(limit, 1))
            self.console.print(f"{name}: at most {limit:.0f} s")
            try:
                work(limit)
            except Exception as error:  # reported, and the next step runs
                self.fail(name, f"{type(error).__name__}: {error}")
        self.result["steps"][name] = took = round(time.monotonic() - begun, 1)
        self.log.write(step=name, took=took)
        self.write()

    def limit(self, name: str) -> float:
        """The seconds until the step's end as it was planned: its own, and what those before it have left."""
        steps = list(self.seconds)
        planned = sum(self.seconds[step] for step in steps[: steps.index(name) + 1])
        return self.began + planned * self.scale - time.monotonic()

    @property
    def scale(self) -> float:
        """What planned seconds are multiplied by: the whole run may take args.limit_s."""
        return self.args.limit_s / sum(self.seconds.values())

    def chosen(self) -> list[str]:
        """The kernels that are asked for; of those in CUDA C++, which nothing interprets, none on a CPU."""
        names = self.args.kernel or list(hardware.KERNELS)
        return names if self.device.type == "cuda" else [name for name in names if name in hardware.names("triton")]

    def fail(self, name: str, why: str) -> None:
        """Make a step's failure part of the result."""
        self.result["errors"][name] = why
        self.log.write(step=name, error=why)
        self.console.print(f"[yellow]{escape(f'{name}: {why}')}[/]")

    def write(self) -> None:
        """Write the result as it is now."""
        write_json(self.path, self.result)

    # What the processes of a step say

    def child(self, *options: str) -> list[str]:
        """The command of a process that does a part of this run."""
        common = ["--device", self.args.device, "--log", str(self.log.path), *(["--quick"] if self.args.quick else [])]
        return [sys.executable, "-m", "bench.gpu", *common, *options]

    def listen(self) -> None:
        """Take over what has come to the log."""
        lines = self.log.new()
        for line in lines:
            self._take(line)
        if any("entry" in line or "damaged" in line for line in lines):
            self.write()

    def _take(self, line: Line) -> None:
        step = line.get("step", "")
        if "damaged" in line:
            self.result["errors"]["log"] = f"a line is damaged: {line['damaged'][:200]}"
        elif "begin" in line:
            self.begun[step].append(line["begin"])
            self.heard = time.monotonic()
        elif "entry" in line:
            entry, self.heard = line["entry"], time.monotonic()
            record = entry.pop("record", None)
            self.result[step].append(entry)
            self.console.print(escape(f"{step}: {gpu_report.line(entry)}"))
            if record is not None:
                self.prove(hardware.Record(**record))

    def add(self, step: str, entry: Entry) -> None:
        """Add an entry by way of the log."""
        self.log.write(step=step, entry=entry)
        self.listen()

    def prove(self, *records: hardware.Record) -> None:
        """Keep records, each in place of an earlier one of its variant: in the result, beside it, and on this machine.

        The steps that follow then take the proved kernels by impl="auto".
        """
        if records:
            hardware.keep(*records)
            self._ship(*records)

    def ship_times(self) -> None:
        """Add to the result what the processes of timed steps have measured for "auto", which this machine keeps."""
        records.reread()
        device = torch.device("cuda", torch.cuda.current_device())
        own = (record for name in self.chosen() for record in hardware.counting(name, device, hardware.own()))
        self._ship(*(record for record in own if record.times))

    def _ship(self, *found: hardware.Record) -> None:
        made = {(record["kernel"], record["variant"]): record for record in self.result["proved"]}
        for record in found:
            if not record.passed:  # then none of its variants is proved
                made = {key: each for key, each in made.items() if key[0] != record.kernel or record.variant}
            made[record.kernel, record.variant] = record.as_json()
        self.result["proved"] = list(made.values())
        self.records_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.records_path, {"proved": self.result["proved"]})


def extension() -> dict[str, bool | str]:
    """Whether the compiled extension is "loaded", "why" not, and what of CUDA is in it."""
    return {"loaded": native.available(), "why": native.why_unavailable(), "cuda": native.CUDA_BUILD}


def _unused(folder: Path, name: str) -> Path:
    """A JSON file in `folder` that is not there: a second run of the same commit overwrites nothing."""
    path, number = folder / f"{name}.json", 2
    while path.exists() or path.with_suffix(".jsonl").exists():
        path, number = folder / f"{name}-{number}.json", number + 1
    return path


def timed(run: Run, name: str, limit: float) -> None:
    """Run a step in a process of its own, and in a further one from the case after that in which one ended or hung.

    Raises:
        RuntimeError: an entry, a variant or a process failed.
    """
    until, tried, troubles = time.monotonic() + limit, 0, list[str]()
    while True:
        run.heard, left = time.monotonic(), max(0.0, until - time.monotonic())
        command = run.child("--step", name, "--skip", str(tried), "--limit-s", f"{left:.1f}")
        ended = run_all(
            {name: command}, at_once=1, listen=run.listen, stop=partial(_overdue, run, until),
            good=(0, TIME_UP, LOST),
        )[name]  # fmt: skip
        begun, first = len(run.begun[name]), tried
        if begun > len(run.result[name]):  # in this case it ended
            run.add(name, {"name": run.begun[name][-1], "error": ended.trouble})
        elif ended.trouble:
            troubles.append(ended.trouble)
        elif ended.status == TIME_UP:
            troubles.append("the time was up before the last case")
        tried = begun
        if ended.status in (0, TIME_UP) or tried == first or time.monotonic() >= until:
            break
    troubles += wrong_entries(run.result[name], run.result["left_out"])
    if troubles:
        raise RuntimeError("; ".join(troubles)[:2000])


def _overdue(run: Run, until: float) -> str:
    """Why the process of a timed step has to end; "" where it may go on."""
    now = time.monotonic()
    if now > until + GRACE:
        return f"its process was ended, {GRACE} s past its time"
    return f"its process was ended: nothing came from it for {SILENCE} s" if now - run.heard > SILENCE else ""


def wrong_entries(entries: list[Entry], known: Mapping[str, str]) -> list[str]:
    """What failed among a step's entries: whole ones, and variants left out for none of the `known` reasons."""
    wrong = [f"{entry['name']}: {entry['error']}" for entry in entries if "error" in entry]
    return wrong + [
        f"{entry['name']}, {variant}: {why}"
        for entry in entries
        for variant, why in entry.get("left_out", {}).items()
        if why not in known.values()
    ]
