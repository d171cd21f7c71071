"""The plots: forgetting against learning, fused against eager training, gates by task type, cost."""

from pathlib import Path
from typing import TYPE_CHECKING

from .methods import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = dict(zip(METHODS, (
    "#3d3d3d", "#2a6fbb", "#7fb3e6", "#8e5bb5", "#e0914a", "#b3541e", "#2f9e63", "#86cfa6", "#c2b100",
), strict=True))  # fmt: skip


def draw(result: dict, path: Path) -> None:
    """Draws `result` to the PNG file `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(18, 9), layout="constrained")
    start = result["untouched"]["points"][0]["general_loss"]
    _trade(axes[0, 0], result, "general_loss", "loss on general texts gained, nats a token", start)
    _trade(axes[0, 1], result, "kl_texts", "KL from the untouched model, general texts")
    _trade(axes[0, 2], result, "kl_own", "KL from the untouched model, its own answers")
    axes[0, 0].legend(fontsize=8, frameon=False, loc="upper left")
    _curves(axes[1, 0], result)
    _gates(axes[1, 1], result)
    _cost(axes[1, 2], result)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _trade(axis: "Axes", result: dict, measure: str, label: str, start: float = 0.0) -> None:
    """A measure of forgetting over the loss gained: a line for each run, and each method's mean at the target."""
    untouched = result["untouched"]["points"][0]["domain_loss"]
    for run in result["runs"]:
        if run["method"] in METHODS:
            gained = [untouched - point["domain_loss"] for point in run["points"]]
            lost = [point[measure] - start for point in run["points"]]
            axis.plot(gained, lost, color=COLORS[run["method"]], alpha=0.35, linewidth=1)
    target = untouched - result["settings"]["schedule"]["target"]
    for name, row in result["summary"]["rows"].items():
        if name in METHODS:
            known = row[measure]["mean"] is not None
            axis.errorbar(
                [target] if known else [], [row[measure]["mean"]] if known else [],
                yerr=[row[measure]["spread"] or 0] if known else [], fmt="o", capsize=3, color=COLORS[name],
                label=row["title"],
            )  # fmt: skip
    axis.axvline(target, color="#cccccc", linewidth=1, zorder=0)
    axis.axhline(0, color="#cccccc", linewidth=1, zorder=0)
    axis.set(xlabel="domain loss gained, nats a token", ylabel=label)


def _curves(axis: "Axes", result: dict) -> None:
    """The training loss of LoRAMoE, fused and eager, for the first seed."""
    first = min(run["seed"] for run in result["runs"])
    for name, style in (("loramoe", {"color": "#2a6fbb"}), ("loramoe_eager", {"color": "#e0914a", "linestyle": "--"})):
        for run in result["runs"]:
            if run["method"] == name and run["seed"] == first:
                axis.plot(range(1, len(run["losses"]) + 1), run["losses"], label=run["title"], **style)
    axis.set(xlabel="step", ylabel="training loss, nats a token", title="LoRAMoE, fused and eager")
    if axis.lines:
        axis.legend(fontsize=8, frameon=False)


def _gates(axis: "Axes", result: dict) -> None:
    """How far each expert's mean gate is from an equal share, for both types of task, over seeds."""
    compared = [("loramoe", "without the constraint"), ("loramoe_balance", "with it")]
    for group, (name, title) in enumerate(compared):
        gates = [run["gates"] for run in result["runs"] if run["method"] == name]
        for task_type, color in ((0, "#9aa5b1"), (1, "#b3541e")):
            if gates:
                means = [
                    sum(values) / len(gates) for values in zip(*(found[task_type] for found in gates), strict=True)
                ]
                experts = [
                    group * (len(means) + 1.5) + expert + (task_type - 0.5) * 0.4 for expert in range(len(means))
                ]
                label = f"task type {task_type}" if not group else None
                axis.bar(experts, [mean - 1 / len(means) for mean in means], width=0.4, color=color, label=label)
                if not task_type:
                    axis.text(experts[0], 1.01, title, transform=axis.get_xaxis_transform(), fontsize=9)
    axis.axhline(0, color="#cccccc", linewidth=1, zorder=0)
    axis.set(xlabel="expert", ylabel="mean gate, above an equal share", xticks=[])
    if axis.patches:
        axis.legend(fontsize=8, frameon=False)


def _cost(axis: "Axes", result: dict) -> None:
    """Training speed of every row, labelled with its memory."""
    rows = list(result["summary"]["rows"].items())[::-1]
    speeds = [row["tokens_per_second"]["mean"] for _, row in rows]
    axis.barh([row["title"] for _, row in rows], speeds, color=[COLORS.get(name, "#9aa5b1") for name, _ in rows])
    for index, (_, row) in enumerate(rows):
        axis.text(speeds[index], index, f" {row['memory']['mean'] / 1e9:.1f} GB", va="center", fontsize=8)
    axis.set(xlabel="training, tokens/s, and memory", xlim=(0, 1.15 * max(speeds)))
