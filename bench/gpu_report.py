"""The result of `python -m bench.gpu`, the content of its JSON file, as tables."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .report import half_span

#: What is shown of the counters that ncu reads: the metric's name, a title, and the unit that it is counted in.
SHOWN = (
    ("gpu__time_duration.sum", "us", 1e3),
    ("sm__throughput.avg.pct_of_peak_sustained_elapsed", "SM, %", 1),
    ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", "memory, %", 1),
    ("dram__bytes_read.sum", "read, MB", 1e6),
    ("dram__bytes_write.sum", "written, MB", 1e6),
    ("sm__warps_active.avg.pct_of_peak_sustained_active", "warps, %", 1),
    ("launch__registers_per_thread", "registers", 1),
)

Result = dict[str, Any]
Entry = dict[str, Any]


def show(result: Result, console: Console) -> None:
    """Print all tables, the steps' times, what was left out or failed, and on what it was measured."""
    tables = {
        "kernels": _kernels, "layers": _layers, "stages": _stages, "decode": _decode, "slices": _slices,
        "counters": _counters, "memcheck": _memcheck,
    }  # fmt: skip
    for table in (*(make(result[step]) for step, make in tables.items() if step in result), _proved(result)):
        console.print(table)
    steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result["steps"].items())
    console.print(f"Steps: {steps}.", highlight=False)
    for name, why in {**result["left_out"], **result["errors"]}.items():
        console.print(f"[yellow]{escape(f'{name}: {why}')}[/]", highlight=False)
    console.print(f"[dim]{escape(provenance(result))}[/]", highlight=False)


def provenance(result: Result) -> str:
    """How and on what it was measured: two lines."""
    return f"{result['timing']}.\n{where(result)}"


def where(result: Result) -> str:
    """The machine, the versions and the commit: one line."""
    machine, versions, commit = result["machine"], result["versions"], result["commit"]
    software = {name: machine[name] for name in ("driver", "cuda", "nvcc")}
    software |= {name: versions[name] for name in ("python", "torch", "triton", "transformers", "peft")}
    named = ", ".join(f"{name} {version}" for name, version in software.items() if version)
    changed = " with changes" if commit["changed"] else ""
    return f"{machine['gpu'] or machine['cpu']}; {named}; commit {commit['sha'][:10]}{changed}"


def line(entry: Entry) -> str:
    """An entry in one line, as it is shown when it comes: the medians and what failed."""
    if "error" in entry:
        return f"{entry['name']}: {entry['error']}"
    seconds = entry.get("seconds", {})
    if not isinstance(seconds, dict):
        return f"{entry['name']}: {entry.get('verdict', 'done')} in {seconds} s"
    said = [f"{name} {timing['median'] * 1000:.3f} ms" for name, timing in seconds.items()]
    said += [f"{name} left out" for name in entry.get("left_out", {})]
    return f"{entry['name']}: {', '.join(said)}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _memcheck(entries: list[Entry]) -> Table:
    return _kernels(entries, "One launch of each kernel under memcheck")


def _counters(entries: list[Entry]) -> Table:
    """A row for each kernel that an implementation of a product launches."""
    table = _table("Counters of the products", "product", "by", "kernel", *(title for _, title, _ in SHOWN))
    for entry in entries:
        if "error" in entry:
            table.add_row(entry["name"], "", escape(entry["error"]))
        for kernel in entry["kernels"]:
            values = [(kernel["metrics"].get(metric), unit) for metric, _, unit in SHOWN]
            cells = ("" if value is None else f"{value / unit:,.1f}" for value, unit in values)
            table.add_row(entry["name"], kernel["by"], escape(kernel["kernel"][:40]), *cells)
    return table


def _kernels(entries: list[Entry], title: str = "Kernels: one launch, and the self check") -> Table:
    table = _table(title, "", "seconds", "")
    for entry in entries:
        table.add_row(
            entry["name"], str(entry.get("seconds", "")), escape(entry.get("error", entry.get("verdict", "done")))
        )
    return table


def _proved(result: Result) -> Table:
    table = _table("Tests, and what is proved", "tests", "passed", "skipped", "failed", "seconds", "verdict")
    verdicts = {record["kernel"]: "proved" if record["passed"] else record["reason"] for record in result["proved"]}
    tests = {kernel: None for kernel in verdicts} | result["tests"]
    for group, outcome in tests.items():
        if outcome is None:  # proved by its self check, or before
            table.add_row(group, *[""] * 4, escape(verdicts[group]))
            continue
        verdict = outcome["trouble"] or verdicts.get(group, "")
        counts = (outcome["passed"], outcome["skipped"], len(outcome["failed"]), outcome["seconds"])
        table.add_row(group, *map(str, counts), escape(verdict))
    return table


def _ms(entry: Entry, name: str) -> str:
    """A variant's median with half the span of its middle 80%, or why there is none."""
    if name in entry.get("seconds", {}):
        timing = entry["seconds"][name]
        return f"{timing['median'] * 1000:,.3f} [dim]±{half_span(timing):.0%}[/]"
    return "failed" if "error" in entry else "left out" if name in entry.get("left_out", {}) else ""


def _median(entry: Entry, kind: str, name: str, form: str) -> str:
    """The median of a variant's "tax", "share" or "tokens_per_second", "" where there is none."""
    found = entry.get(kind, {})
    return f"{found[name]['median']:{form}}" if name in found else ""


def _of_floor(entry: Entry, name: str, floor: float | None) -> str:
    if not floor or name not in entry.get("seconds", {}):
        return ""
    return f"{floor / entry['seconds'][name]['median']:.0%}"


def _stages(entries: list[Entry]) -> Table:
    """A row for each implementation of each stage."""
    table = _table("Stages in bfloat16", "stage", "by", "ms", "of the roofline", "library / it")
    for entry in entries:
        floor, seconds = entry.get("floor_seconds"), entry.get("seconds", {})
        for name in seconds or [""]:
            ratio = f"{seconds['aten']['median'] / seconds[name]['median']:.2f}" if "aten" in seconds else ""
            by = "library" if name == "aten" else name
            table.add_row(entry["name"], by, _ms(entry, name), _of_floor(entry, name, floor), ratio)
    return table


SLICE_COLUMNS = ("frozen", "eager", "compiled", "gci")


def _layers(entries: list[Entry]) -> Table:
    """A row for each variant of each layer."""
    table = _table("One adapted layer, forward and backward (eager: the published layer; for LoRA, PEFT's)", "",
                   "variant", "ms", "adapter tax", "of the roofline")  # fmt: skip
    for entry in entries:
        floors = entry.get("floor_seconds") or {}
        for name in [*entry.get("seconds", {}), *entry.get("left_out", {})] or [""]:
            floor = floors.get("frozen" if name == "frozen" else "gci")
            cells = _ms(entry, name), _median(entry, "tax", name, ".3f"), _of_floor(entry, name, floor)
            table.add_row(entry["name"] if name in ("frozen", "") else "", name, *cells)
    return table


def _slices(entries: list[Entry]) -> Table:
    table = _table("Train steps of Llama layers (eager: the published layer; for LoRA, PEFT's)", "", *SLICE_COLUMNS)
    for entry in entries:
        peaks = entry.get("peak_memory", {})
        table.add_row(f"{entry['name']}, tokens/s", *(_rate(entry, name) for name in SLICE_COLUMNS))
        table.add_row("  adapter tax", *(_median(entry, "tax", name, ".3f") for name in SLICE_COLUMNS))
        cells = (f"{peaks[name] / 2**30:.2f}" if peaks.get(name) is not None else "" for name in SLICE_COLUMNS)
        table.add_row("  peak memory, GiB", *cells)
    return table


DECODE_COLUMNS = ("frozen", "eager", "gci")


def _decode(entries: list[Entry]) -> Table:
    """A row for each way to run: plain calls, CUDA graphs, compiled."""
    table = _table("Decoding of Llama layers, tokens/s, and per cent of the frozen base's", "", "frozen", "eager", "%",
                   "gci", "%", "asked for")  # fmt: skip
    for entry in entries:
        tried = {**entry.get("seconds", {}), **entry.get("left_out", {})}
        ways = list(dict.fromkeys(" ".join(name.split()[1:]) for name in tried)) or [""]
        for way in ways:
            cells = []
            for variant in DECODE_COLUMNS:
                name = f"{variant} {way}".strip()
                cells += [_rate(entry, name)]
                if variant != "frozen":
                    cells += [_median(entry, "share", name, ".1%")]
            asked = f"{entry['required']:.0%}" if way == "graph" and "required" in entry else ""
            table.add_row(f"{entry['name']}{f', {way}' if way else ''}", *cells, asked)
        if entry.get("plan"):
            kernels = entry.get("kernels", {})
            counts = (str(kernels[name]) if kernels.get(name) is not None else "" for name in DECODE_COLUMNS)
            frozen, eager, gci = counts
            table.add_row("  kernels a step", frozen, eager, "", gci)
            table.add_row(f"  one of {entry['adapted_layers']} adapted layers: {entry['plan']}")
    return table


def _rate(entry: Entry, name: str) -> str:
    return _median(entry, "tokens_per_second", name, ",.0f") or _ms(entry, name)
