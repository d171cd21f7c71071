"""The results of a run as tables for a terminal and as a plot, both from the content of its JSON file."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cases import registered_methods
from .markdown import at_commit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = {"frozen": "frozen base", "eager": "eager PyTorch", "gci": "gci_kernels"}
COLORS = {"frozen": "#9aa5b1", "eager": "#e0914a", "gci": "#2a6fbb"}
DOUBTFUL_SPREAD = 0.2
#: The names of the methods, in the order of tables.
METHODS = {"lora": "LoRA", "loramoe": "LoRAMoE", "alora": "ALoRA", "loki": "LoKI"}


def display_name(method: str) -> str:
    """A method's name as it is written."""
    return METHODS.get(method) or registered_methods()[method].name


TIMED = ("train", "generate", "generate_many")  # the parts of a model's results that hold times


def print_tables(result: dict, console: Console) -> None:
    """Prints a table for each shape of layers and for the model in each dtype, and where they were measured."""
    for _, layers in itertools.groupby(result["layers"], key=lambda layer: _shape(layer["case"])):
        console.print(layer_table(list(layers)))
    for model in result["models"]:
        console.print(model_table(result, model))
        console.print(_agreement(model["generate"]), markup=False, highlight=False)
    for line in notes(result):
        console.print(line, markup=False, highlight=False)
    if _widest_spread(result) > DOUBTFUL_SPREAD:
        console.print(
            f"[yellow]Some times vary by more than ±{DOUBTFUL_SPREAD:.0%}: was the machine busy with other work?[/]"
        )
    console.print(f"[dim]{escape(provenance(result))}[/]", highlight=False)


def _timed(result: dict) -> list[dict]:
    """All parts of a result that hold times."""
    return [*result["layers"], *(model[part] for model in result["models"] for part in TIMED if part in model)]


def _widest_spread(result: dict) -> float:
    return max(_half_span(timing) for part in _timed(result) for timing in part["seconds"].values())


def rounds(result: dict) -> str:
    """How often numbers were measured: "10", or "3 to 10"."""
    counts = {len(timing["samples"]) for part in _timed(result) for timing in part["seconds"].values()}
    return " to ".join(str(count) for count in sorted({min(counts), max(counts)}))


def notes(result: dict) -> list[str]:
    """What was not measured, or at a smaller size, and why."""
    settings, products, lines = result["settings"], result["products"], []
    for dtype in result["left_out"]:
        rates = {name: products[name] for name in (dtype, "float32")}
        named = [f"{name} {number(rate['forward'])} and {number(rate['dx'])}" for name, rate in rates.items()]
        lines.append(
            f"{dtype} was left out: PyTorch multiplies it slowly here (GFLOP/s of a core, forward and dX: "
            f"{', '.join(named)}); --dtype {dtype} measures it."
        )
    if result["shrunk"]:
        minutes = 2 if settings["quick"] else 15
        lines.append(f"Less was measured, to end within {minutes} minutes.")
        for dtype, less in itertools.groupby(result["shrunk"], key=lambda each: each["dtype"]):
            listed = "; ".join(f"{each['what']} {each['used']}, not {each['wanted']}" for each in less)
            lines.append(f"{dtype}: {listed}.")
    lines += [f"{dtype} was left out: the time was used up before it." for dtype in result["out_of_time"]]
    return lines


def layer_table(layers: list[dict]) -> Table:
    """The table of layers that have the same shape."""
    case = layers[0]["case"]
    table = _table(
        f"One {display_name(case['method'])} layer, {_size(case)}, {case['in_features']} to "
        f"{case['out_features']}, {case['tokens']} tokens: forward and backward"
    )
    for layer in layers:
        _row(table, f"{layer['case']['dtype']}, ms", _cells(layer["seconds"], unit=1000))
        _ratio_rows(table, layer)
        if layer["floor_seconds"]:
            _row(table, "  per cent of the roofline", _of_floor(layer))
        table.add_section()
    return table


def _shape(case: dict) -> tuple[int, int, int]:
    return case["tokens"], case["in_features"], case["out_features"]


def _size(case: dict) -> str:
    if case["method"] == "loki":
        return f"{case['quota']}% of the rows trained"
    experts = f"{case['num_experts']} experts of " if case["method"] == "loramoe" else ""
    return f"{experts}rank {case['rank']}"


def _of_floor(layer: dict) -> dict[str, str]:
    """The lower bound of each time, by the chip's rates, as a percentage of the time."""
    floors, times = layer["floor_seconds"], layer["seconds"]
    return {name: f"{floors[name] / times[name]['median']:.0%}" for name in floors}


def model_table(result: dict, model: dict) -> Table:
    """The table of the model in one dtype."""
    method, train = display_name(result["settings"]["method"]), model["train"]
    table = _table(
        f"{model['name']} ({model['parameters'] / 1e6:.0f}M) with {method} "
        f"({model['trainable'] / 1e6:.1f}M trained), {model['dtype']}, batch {train['batch']}x{train['seq']}"
    )
    _row(table, "train step, tokens/s", _cells(train["tokens_per_second"]))
    _ratio_rows(table, train)
    for part in TIMED[1:]:
        if part in model:
            table.add_section()
            many = f" of {model[part]['batch']} together" if model[part]["batch"] > 1 else ""
            _row(table, f"generation{many}, tokens/s", _cells(model[part]["tokens_per_second"]))
            _ratio_rows(table, model[part])
    table.add_section()
    _row(table, "peak memory of a train step", {name: _bytes(size) for name, size in train["peak_memory"].items()})
    _row(table, "saved for backward, a token", {name: _bytes(size) for name, size in train["saved"].items()})
    _row(table, "  by the adapters alone", {name: _bytes(size) for name, size in train["saved_by_adapters"].items()})
    if any(train["copies"].values()):
        _row(table, "copies of weights, kept", {name: _bytes(size) for name, size in train["copies"].items()})
    return table


def provenance(result: dict) -> str:
    """One paragraph: what the numbers are, and the machine, versions and commit they belong to."""
    machine, versions = result["machine"], result["versions"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores"
    named = ", ".join(f"{name} {versions[name]}" for name in ("gci_kernels", "torch", "transformers", "peft"))
    return (
        f"Medians of {rounds(result)} interleaved rounds; ± is half the span of the middle 80%. Adapter "
        "tax: time over the frozen base's, which carries the gradient to its input as well. A train step is forward "
        f"and backward, without the optimizer; adapters in {_adapters(result)}.\n"
        f"{where}; {named}{at_commit(result['commit'])}"
    )


def _adapters(result: dict) -> str:
    return "float32" if result["settings"]["adapter_dtype"] == "float32" else "the model's dtype"


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for header in COLUMNS.values():
        table.add_column(header, justify="right")
    return table


def _row(table: Table, label: str, cells: dict[str, str]) -> None:
    table.add_row(label, *(cells.get(name, "") for name in COLUMNS))


def _ratio_rows(table: Table, timed: dict) -> None:
    _row(table, "  adapter tax", _cells(timed["tax"]))
    _row(table, "  speed-up over eager", _cells({"gci": timed["speedup"]}))


def _cells(timings: dict[str, dict], unit: float = 1) -> dict[str, str]:
    return {name: _spread(timing, unit) for name, timing in timings.items()}


def _spread(timing: dict, unit: float) -> str:
    return f"{number(timing['median'] * unit)} [dim]±{_half_span(timing):.0%}[/]"


def _half_span(timing: dict) -> float:
    """Half the distance from the 10th to the 90th percentile, relative to the median."""
    return (timing["high"] - timing["low"]) / 2 / timing["median"]


def number(value: float) -> str:
    """A positive number to three digits, or to as many as its whole part has."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _bytes(size: float | None) -> str:
    if size is None:
        return "not known here"
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _agreement(generate: dict) -> str:
    line = f"greedy tokens: the first {generate['same_tokens']} of {generate['of']} are eager's as well"
    return f"{line}\ngci_kernels wrote: {generate['texts']['gci']!r}" if generate["texts"] else line


def draw(result: dict, path: Path) -> None:
    """A PNG of 1200 x 420 pixels: tokens/s in training and generation, and what the adapters save for backward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {
        "Training, tokens/s": lambda model: medians(model["train"]["tokens_per_second"]),
        "Generation, tokens/s": lambda model: medians(model["generate"]["tokens_per_second"]),
        "Adapters keep for backward, KiB a token": _adapter_kib,
    }
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), dpi=100)
        for axis, (title, values) in zip(axes, panels.items(), strict=True):
            _bars(axis, [(model["dtype"], values(model)) for model in result["models"]])
            axis.set_title(title, fontsize=11.5, pad=12)
        model, method = result["models"][0]["name"], display_name(result["settings"]["method"])
        where = result["machine"]["gpu"] or f"{result['machine']['cpu']}, {result['machine']['threads']} threads"
        figure.suptitle(f"{model} with {method}, on {where}", fontsize=13, fontweight="bold", y=0.98)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
        figure.tight_layout(rect=(0, 0.07, 1, 0.98), w_pad=3)
        figure.savefig(path, format="png")
        plt.close(figure)


def medians(timings: dict[str, dict]) -> dict[str, float]:
    """The medians of several timings."""
    return {name: timing["median"] for name, timing in timings.items()}


def _adapter_kib(model: dict) -> dict[str, float]:
    return {name: size / 1024 for name, size in model["train"]["saved_by_adapters"].items()}


def _bars(axis: "Axes", groups: list[tuple[str, dict[str, float]]]) -> None:
    """A bar for each variant, labelled with its value, in each group (a dtype and its values)."""
    names = list(groups[0][1])
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        offset = (index - (len(names) - 1) / 2) * width
        heights = [values[name] for _, values in groups]
        places = [group + offset for group in range(len(groups))]
        bars = axis.bar(places, heights, width * 0.94, color=COLORS[name], label=COLUMNS[name])
        axis.bar_label(bars, [number(height) for height in heights], padding=2, fontsize=9.5)
    axis.set_xticks(range(len(groups)), [dtype for dtype, _ in groups])
    axis.tick_params(axis="x", length=0)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.margins(y=0.12)
