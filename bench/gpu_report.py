"""The result of `python -m bench.gpu`, the content of its JSON file, as tables."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Result = dict[str, Any]
Entry = dict[str, Any]


def show(result: Result, console: Console) -> None:
    """Print all tables, the steps' times, what was left out or failed, and on what it was measured."""
    tables = (_stages, "stages"), (_layers, "layers"), (_decode, "decode"), (_slices, "slices")
    for table in (_proved(result), *(make(result[step]) for make, step in tables)):
        console.print(table)
    steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result["steps"].items())
    console.print(f"Steps: {steps}.", highlight=False)
    for name, why in {**result["left_out"], **result["errors"]}.items():
        console.print(f"[yellow]{escape(f'{name}: {why}')}[/]", highlight=False)
    console.print(f"[dim]{escape(provenance(result))}[/]", highlight=False)


def provenance(result: Result) -> str:
    """How and on what it was measured: two lines."""
    machine, versions, commit = result["machine"], result["versions"], result["commit"]
    software = {name: machine[name] for name in ("driver", "cuda", "nvcc")}
    software |= {name: versions[name] for name in ("python", "torch", "triton", "transformers", "peft")}
    named = ", ".join(f"{name} {version}" for name, version in software.items() if version)
    changed = " with changes" if commit["changed"] else ""
    return f"{result['timing']}.\n{machine['gpu'] or machine['cpu']}; {named}; commit {commit['sha'][:10]}{changed}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _proved(result: Result) -> Table:
    table = _table("Tests, and what they prove", "tests", "passed", "skipped", "failed", "seconds", "verdict")
    verdicts = {record["kernel"]: "proved" if record["passed"] else record["reason"] for record in result["proved"]}
    for group, outcome in result["tests"].items():
        verdict = outcome["trouble"] or verdicts.get(group, "")
        counts = (outcome["passed"], outcome["skipped"], len(outcome["failed"]), outcome["seconds"])
        table.add_row(group, *map(str, counts), escape(verdict))
    return table


def _ms(entry: Entry, name: str) -> str:
    """A variant's median with half the span of its middle 80%, or why there is none."""
    if name in entry.get("seconds", {}):
        timing = entry["seconds"][name]
        spread = (timing["high"] - timing["low"]) / 2 / timing["median"]
        return f"{timing['median'] * 1000:,.3f} [dim]±{spread:.0%}[/]"
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
    table = _table(
        "Stages, ms, and per cent of the roofline", "method", "stage", "library", "%", "Triton", "%",
        "library / Triton", "library, W' kept",
    )  # fmt: skip
    for entry in entries:
        floor, seconds = entry.get("floor_seconds"), entry.get("seconds", {})
        ratio = f"{seconds['aten']['median'] / seconds['triton']['median']:.2f}" if "triton" in seconds else ""
        table.add_row(
            entry.get("method", ""), entry["name"], _ms(entry, "aten"), _of_floor(entry, "aten", floor),
            _ms(entry, "triton"), _of_floor(entry, "triton", floor), ratio,
            _ms(entry, "kept"),
        )  # fmt: skip
    return table


LAYER_COLUMNS = ("frozen", "eager", "compiled", "gci auto", "gci triton", "gci aten")
SLICE_COLUMNS = ("frozen", "eager", "compiled", "gci")


def _layers(entries: list[Entry]) -> Table:
    table = _table("One adapted layer, forward and backward (eager: the published layer; for LoRA, PEFT's)", "",
                   *LAYER_COLUMNS)  # fmt: skip
    for entry in entries:
        table.add_row(f"{entry['name']}, ms", *(_ms(entry, name) for name in LAYER_COLUMNS))
        table.add_row("  adapter tax", *(_median(entry, "tax", name, ".3f") for name in LAYER_COLUMNS))
        floors = entry.get("floor_seconds")
        if floors:
            cells = (_of_floor(entry, name, floors["frozen" if name == "frozen" else "gci"]) for name in LAYER_COLUMNS)
            table.add_row("  per cent of the roofline", *cells)
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
