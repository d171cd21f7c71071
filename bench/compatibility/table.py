"""The rows of a run as Markdown: how many classes each method works in, and what happens in each of them."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..markdown import at_commit, table
from ..report import METHODS

#: The outcomes of a method in a class.
OUTCOMES = YES, REFUSED, FAILS, ANYWAY = "yes", "refused", "fails", "fails anyway"
KINDS = ("causal", "sequence-to-sequence", "vision-language")

Row = dict[str, Any]


def outcomes(rows: Iterable[Row], method: str) -> Counter[str]:
    """How often a method has each outcome, in the classes that could be checked."""
    return Counter(row["methods"][method]["outcome"] for row in rows if method in row.get("methods", ()))


def counts(result: dict[str, Any], methods: Iterable[str] = tuple(METHODS)) -> str:
    """A table: for each kind of classes how many there are and could be checked, and each method's outcomes."""
    methods = list(methods)
    lines = []
    for kind in KINDS:
        rows = [row for row in result["classes"] if row["kind"] == kind]
        checked = [row for row in rows if "methods" in row]
        cells = (_counted(outcomes(rows, method)) for method in methods)
        lines.append([kind, f"{len(checked)} of {len(rows)}", *cells])
    return table(["classes of transformers", "checked", *(METHODS[method] for method in methods)], lines)


def _counted(found: Counter[str]) -> str:
    """The number of "yes", and those of other outcomes that occur."""
    others = [f"{found[outcome]} {outcome}" for outcome in OUTCOMES if outcome != YES and found[outcome]]
    return "; ".join([str(found[YES]), *others])


def summary(result: dict[str, Any]) -> str:
    """The versions and the commit that were checked, and the counts."""
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "transformers", "peft"))
    return f"{versions}{at_commit(result['commit'])}.\n\n{counts(result)}"


def every_class(result: dict[str, Any]) -> str:
    """Every class with each method's outcome, the reasons, and the classes that were not checked and why."""
    reasons: dict[str, int] = {}
    parts = []
    for kind in KINDS:
        rows = [row for row in result["classes"] if row["kind"] == kind and "methods" in row]
        lines = [
            [f"`{row['name']}`", row["inputs"], *(_cell(row, method, reasons) for method in METHODS)] for row in rows
        ]
        parts.append(f"### {kind.capitalize()}\n\n{table(['class', 'inputs', *METHODS.values()], lines)}")
    parts.append("### Reasons\n\n" + "\n".join(f"{number}. {_escape(reason)}" for reason, number in reasons.items()))
    left = [f"- `{row['name']}`: {_escape(row['left_out'])}" for row in result["classes"] if "left_out" in row]
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


def _escape(text: str) -> str:
    """The text with Markdown's special characters escaped."""
    return re.sub(r"[*_\[]", r"\\\g<0>", text.replace("<", "&lt;").replace("`", "'").replace("](", "] ("))
