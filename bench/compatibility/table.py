"""The rows of a run as Markdown: how many classes each method works in, and what happens in each of them."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

#: The methods in the order of the tables, and what one can do in a class.
METHODS = {"lora": "LoRA", "loramoe": "LoRAMoE", "alora": "ALoRA", "loki": "LoKI"}
OUTCOMES = YES, REFUSED, FAILS, ANYWAY = "yes", "refused", "fails", "fails anyway"
KINDS = ("causal", "sequence-to-sequence", "vision-language")

Row = dict[str, Any]


def outcomes(rows: Iterable[Row], method: str) -> Counter[str]:
    """How often a method does what, in the classes that could be checked."""
    return Counter(row["methods"][method]["outcome"] for row in rows if method in row.get("methods", ()))


def counts(result: dict[str, Any], methods: Iterable[str] = tuple(METHODS)) -> str:
    """For each kind of classes how many there are, how many could be checked, and how each method does in those."""
    methods = list(methods)
    lines = [
        ["classes of transformers", "checked", *(METHODS[method] for method in methods)],
        ["---"] * (2 + len(methods)),
    ]
    for kind in KINDS:
        rows = [row for row in result["classes"] if row["kind"] == kind]
        checked = [row for row in rows if "methods" in row]
        cells = (_counted(outcomes(rows, method)) for method in methods)
        lines.append([kind, f"{len(checked)} of {len(rows)}", *cells])
    return _table(lines)


def _counted(found: Counter[str]) -> str:
    """The number of "yes", and the others where there are any."""
    others = [f"{found[outcome]} {outcome}" for outcome in OUTCOMES if outcome != YES and found[outcome]]
    return "; ".join([str(found[YES]), *others])


def summary(result: dict[str, Any]) -> str:
    """The counts, under the versions and the commit that they are of."""
    versions, commit = result["versions"], result["commit"]
    changed = " with changes" if commit and commit["changed"] else ""
    at = f", commit {commit['sha'][:10]}{changed}" if commit else ""
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft"))
    return f"{named}{at}.\n\n{counts(result)}"


def every_class(result: dict[str, Any]) -> str:
    """Every class that was checked with what each method does in it, the reasons, and what was not checked and why."""
    reasons: dict[str, int] = {}
    parts = []
    for kind in KINDS:
        rows = [row for row in result["classes"] if row["kind"] == kind and "methods" in row]
        lines = [["class", "inputs", *METHODS.values()], ["---"] * (2 + len(METHODS))]
        lines += [
            [f"`{row['name']}`", row["inputs"], *(_cell(row, method, reasons) for method in METHODS)] for row in rows
        ]
        parts.append(f"### {kind.capitalize()}\n\n{_table(lines)}")
    parts.append("### Reasons\n\n" + "\n".join(f"{number}. {_plain(reason)}" for reason, number in reasons.items()))
    left = [f"- `{row['name']}`: {_plain(row['left_out'])}" for row in result["classes"] if "left_out" in row]
    parts.append("### Not checked\n\n" + "\n".join(left))
    return "\n\n".join(parts)


def _cell(row: Row, method: str, reasons: dict[str, int]) -> str:
    found = row["methods"].get(method)
    if found is None:
        return ""
    if found["outcome"] == YES:
        usual = "all-linear" if method == "lora" else "default"
        return YES if found["targets"] == usual else f"{YES}, {found['targets']}"
    number = reasons.setdefault(found["why"], len(reasons) + 1)
    return f"{found['outcome']} ({number})"


def _plain(text: str) -> str:
    """Without what Markdown would read as its own."""
    return (
        text.replace("<", "&lt;")
        .replace("*", "\\*")
        .replace("_", "\\_")
        .replace("`", "'")
        .replace("](", "] (")
        .replace("[", "\\[")
    )


def _table(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
