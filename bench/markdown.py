"""Tables in Markdown, and the commit in a sentence about where something was measured."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of a head and rows of cells."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def at_commit(commit: dict | None) -> str:
    """ ", commit 0123456789", of what :func:`.machine.commit` returns; "" outside a checkout."""
    if commit is None:
        return ""
    return f", commit {commit['sha'][:10]}{' with changes' if commit['changed'] else ''}"
