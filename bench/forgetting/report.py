"""The summary of all runs, tables in Markdown, and whether the orderings that papers report hold here."""

from collections.abc import Callable, Iterable, Sequence
from statistics import mean, median, stdev

from ..markdown import at_commit, table
from .domain import GROUPS
from .gates import separation
from .methods import EAGER, METHODS

ANSWERS = (*GROUPS, "arithmetic", "glosses")

# The paper, its claim, the method that should have the lower measure, and the one that should have the higher.
CLAIMS = (
    ("2403.02756", "REGA's mixture makes LoRA forget less", "lora_rega", "lora"),
    ("2312.09979", "LoRAMoE forgets less than full fine-tuning", "loramoe", "full"),
    ("2312.09979", "LoRAMoE forgets less than LoRA", "loramoe", "lora"),
    ("2312.09979", "the balance constraint makes LoRAMoE forget less", "loramoe_balance", "loramoe"),
    ("2505.22120", "LoKI forgets less than full fine-tuning", "loki_10", "full"),
    ("2505.22120", "LoKI forgets less than LoRA", "loki_10", "lora"),
    ("2505.22120", "fewer rows forget less", "loki_10", "loki_30"),
    ("2505.22120", "LoKI* forgets less than LoRA", "loki_star", "lora"),
    ("2405.09673", "LoRA forgets less than full fine-tuning", "lora", "full"),
)
MEASURES = {"general_loss": "loss on texts", "kl_texts": "KL on texts", "kl_own": "KL on own answers"}


def summary(untouched: dict, results: Sequence[dict]) -> dict:
    """Mean and standard deviation over seeds for every method, and the result for every claim."""
    by_method = {name: [run for run in results if run["method"] == name] for name in METHODS | EAGER}
    rows = {name: _row(runs, untouched) for name, runs in by_method.items() if runs}
    return {
        "rows": rows,
        "claims": [_claim(claim, by_method) for claim in CLAIMS if all(by_method[n] for n in claim[2:])],
    }


def _row(runs: list[dict], untouched: dict) -> dict:
    start = untouched["points"][0]["general_loss"]

    def over(value: Callable[[dict], float | None]) -> dict:
        values = [value(run) for run in runs]
        known = [v for v in values if v is not None]
        return {
            "mean": mean(known) if known else None,
            "spread": stdev(known) if len(known) > 1 else None,
            "values": values,
        }

    def at_target(name: str) -> Callable[[dict], float | None]:
        return lambda run: run["matched"][name] if run["matched"] else None

    return {
        "title": runs[0]["title"],
        "trainable": runs[0]["trainable"],
        "learning_rate": runs[0]["learning_rate"],
        "reached": sum(run["matched"] is not None for run in runs),
        "runs": len(runs),
        "tokens": over(at_target("tokens")),
        "kl_texts": over(at_target("kl_texts")),
        "kl_own": over(at_target("kl_own")),
        "general_loss": over(lambda run: run["matched"]["general_loss"] - start if run["matched"] else None),
        "last_domain_loss": over(lambda run: run["points"][-1]["domain_loss"]),
        "answers": {name: over(lambda run, name=name: run["answers"][name]) for name in ANSWERS},
        "tokens_per_second": over(_rate),
        "memory": over(lambda run: sum(value or 0 for value in run["memory"].values())),
        "separation": over(lambda run: separation(run["gates"]) if run["gates"] else None),
    }


def _rate(run: dict) -> float:
    """Tokens a second without padding, the median over all steps but the first two, which warm up."""
    return median(tokens / seconds for tokens, seconds in list(zip(run["tokens"], run["seconds"], strict=True))[2:])


def _claim(claim: tuple[str, str, str, str], by_method: dict[str, list[dict]]) -> dict:
    """In how many seeds the first method has the lower measure, of those in which both reach the target."""
    paper, text, lower, higher = claim
    found = {}
    for measure in MEASURES:
        pairs = [
            (low["matched"][measure], high["matched"][measure])
            for low in by_method[lower]
            for high in by_method[higher]
            if low["seed"] == high["seed"] and low["matched"] and high["matched"]
        ]
        found[measure] = {"seeds": sum(low < high for low, high in pairs), "of": len(pairs)}
    return {"paper": paper, "claim": text, "lower": lower, "higher": higher, "found": found}


def verdict(found: dict) -> str:
    """The result for a claim in words: it "appears" only if it holds in every seed."""
    if not found["of"]:
        return "not compared"
    if found["seeds"] == found["of"]:
        return "appears"
    return "reversed" if not found["seeds"] else f"in {found['seeds']} of {found['of']} seeds"


def markdown(result: dict) -> str:
    """The whole report: the tables, the gates, the claims, and where it was measured."""
    schedule = result["settings"]["schedule"]
    parts = [
        f"# Forgetting at a domain loss of {schedule['target']:g}",
        _introduction(result),
        _forgetting(result),
        "## What training cost",
        _cost(result),
        _gates(result),
        "## Published orderings",
        _claims(result),
        _rates(result),
        _provenance(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(result: dict) -> str:
    untouched, settings = result["untouched"]["points"][0], result["settings"]
    start = untouched["general_loss"]
    return (
        "SmolLM2-135M-Instruct learns three kinds of tasks about clauses of software licences: to read a term and "
        "calculate with it, to name what a clause is about, and to refuse or qualify what it does not allow. A run "
        f"ends when its loss on clauses of unseen licences is down from {untouched['domain_loss']:.2f} to "
        f"{settings['schedule']['target']:g} nats a token. What is lost is taken where the domain loss crosses that "
        "value: by how much the loss on general texts has grown (documentation and glosses; "
        f"{start:.3f} at first), and the KL divergence from the untouched model, on those texts and on its own answers "
        "to general instructions that no run trains on. Shares of right answers are those of the model that a run ends "
        "with; arithmetic and glosses have four answers to choose from. "
        f"{_over(len(settings['seeds']))} All methods are asked under one prompt."
    )


def _over(seeds: int) -> str:
    return f"Mean over {seeds} seeds, ± standard deviation." if seeds > 1 else "One seed."


# The cells of a method's row, by the heading of the column.
_CELLS: dict[str, Callable[[dict], str]] = {
    "method": lambda row: row["title"],
    "trained": lambda row: f"{row['trainable'] / 1e6:.1f}M",
    "reached": lambda row: f"{row['reached']} of {row['runs']}",
    "tokens": lambda row: _cell(row["tokens"], ".0f"),
    MEASURES["general_loss"]: lambda row: _cell(row["general_loss"], "+.3f"),
    MEASURES["kl_texts"]: lambda row: _cell(row["kl_texts"], ".3f"),
    MEASURES["kl_own"]: lambda row: _cell(row["kl_own"], ".3f"),
    **{name: lambda row, name=name: _cell(row["answers"][name], ".2f") for name in ANSWERS},
    **dict.fromkeys(("tokens/s", "training, tokens/s"), lambda row: _cell(row["tokens_per_second"], ".0f")),
    "memory": lambda row: f"{row['memory']['mean'] / 1e9:.1f} GB",
    "learning rate": lambda row: f"{row['learning_rate']:g}",
    "memory, GB": lambda row: f"{row['memory']['mean'] / 1e9:.2f}",
    "domain loss at the end": lambda row: _cell(row["last_domain_loss"], ".3f"),
    "difference of shares": lambda row: _cell(row["separation"], ".4f"),
}


def _table(head: Sequence[str], rows: Iterable[dict], first: Sequence[Sequence[str]] = ()) -> str:
    """A row of cells for each of `rows`, the methods' summaries, below those of `first`."""
    return table(head, [*first, *([_CELLS[name](row) for name in head] for row in rows)])


def _forgetting(result: dict) -> str:
    head = ["method", "trained", "reached", "tokens", *MEASURES.values(), *ANSWERS]
    answers = result["untouched"]["answers"]
    untouched = ["untouched", "", "", "", "0", "0", "0", *(f"{answers[name]:.2f}" for name in ANSWERS)]
    return _table(head, _compared(result), [untouched])


def short_table(result: dict) -> str:
    """What every method forgot, and its cost: the table of the documentation."""
    head = ["method", "trained", *MEASURES.values(), "training, tokens/s", "memory"]
    return _table(head, result["summary"]["rows"].values())


def _compared(result: dict) -> list[dict]:
    """The rows of the compared methods, without those that are there to compare the time with."""
    return [row for name, row in result["summary"]["rows"].items() if name in METHODS]


def _cost(result: dict) -> str:
    head = ["method", "learning rate", "tokens/s", "memory, GB", "domain loss at the end"]
    return _table(head, result["summary"]["rows"].values()) + (
        "\n\nTokens are those of the batches without padding; the time is that of whole steps, the optimizer's part "
        "included. Memory: weights, AdamW's moments and the peak of a step above both. Full fine-tuning trains in "
        "float32, all others in bfloat16 with float32 adapters; all are looked at in bfloat16. Runs come seed by seed, "
        "the eager one last: a machine whose speed drifts shows in the spread, and eager is to be compared with the "
        "last seed."
    )


def _gates(result: dict) -> str:
    rows = [row for row in _compared(result) if row["separation"]["mean"] is not None]
    if not rows:
        return ""
    return (
        "## LoRAMoE's two groups of experts\n\n"
        "How far apart the shares of the gates are that the first half of the experts gets for one type of task "
        "(calculating, type 1) and for the other (type 0): 0 where both halves serve both alike. The published "
        "constraint evens out weight times gate, so each half gets less of the type that it is weighted up for.\n\n"
    ) + _table(["method", "difference of shares"], rows)


def _claims(result: dict) -> str:
    rows = [
        [f"{claim['claim']} (arXiv {claim['paper']})", *(verdict(claim["found"][measure]) for measure in MEASURES)]
        for claim in result["summary"]["claims"]
    ]
    return table(["claim", *(f"by {text}" for text in MEASURES.values())], rows)


def _rates(result: dict) -> str:
    if not result["trials"]:
        return ""
    return (
        "## Learning rates\n\n"
        "A higher rate gets there sooner and forgets more on its way. Each method has the lowest of 1, 2 and 5 times "
        f"the powers of ten with which it reaches the target within {result['settings']['schedule']['steps']} steps, "
        "found with a seed that is in no row above (`--search`); REGA and the balance constraint go with the rate of "
        f"the method without. Kept trials{_commits(result['trials'])}:\n\n"
    ) + trials_table(result["trials"])


def trials_table(trials: list[dict]) -> str:
    """The result of each learning rate that was tried."""
    head = ["method", "rate", "domain loss at the end", "step at the target", "KL on texts", "KL on own answers"]
    rows = []
    for run in trials:
        cells = [run["title"], f"{run['learning_rate']:g}", f"{run['points'][-1]['domain_loss']:.3f}"]
        at = run["matched"]
        cells += [f"{at['step']:.0f}", f"{at['kl_texts']:.3f}", f"{at['kl_own']:.3f}"] if at else ["–"] * 3
        rows.append(cells)
    return table(head, rows)


def _provenance(result: dict) -> str:
    machine, versions = result["machine"], result["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("python", "gci_kernels", "torch", "transformers", "peft"))
    at = _commits(result["runs"])
    return f"{machine['cpu']}, {machine['threads']} threads; {named}{at}."


def _commits(runs: list[dict]) -> str:
    """The commits of the runs, each after a comma."""
    return "".join(sorted({at_commit(run["commit"]) for run in runs}))


def _cell(found: dict, form: str) -> str:
    if found["mean"] is None:
        return "–"
    spread = "" if found["spread"] is None else f" ±{found['spread']:{form.removeprefix('+')}}"
    return f"{found['mean']:{form}}{spread}"
