"""The legal domain: three groups of tasks made from licence texts, each with a known answer.

Each needs a general ability as well: "term" calculates with a number that a clause gives, "summary" names the subject
of a clause, "permission" answers what a clause allows, also where the clause says nothing about it.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from . import term
from .clauses import Clause, normalised, opening, split
from .numbers import given_number
from .permission import Action, all_actions, silent_about, verdict

GROUPS = ("term", "summary", "permission")
# Where there are fewer clauses than tasks, several tasks are made of one, with other numbers or in other words.
TIMES_ASKED = {"term": 10, "summary": 1, "permission": 3}
# SmolLM2's tokens have about 4.5 characters: no prompt is longer than 220 tokens.
MAX_CHARACTERS = 900
UNSAID = "The clause does not say."

Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class Task:
    """A question about a clause: the user's whole turn, the answer to learn, and the key to score answers by."""

    group: str
    prompt: str
    answer: str
    key: str
    source: str
    # For LoRAMoE's balance constraint: 1 for a task that needs a general ability (calculation) most.
    task_type: int


def make(texts: dict[str, str], *, train: int, held_out: int, seed: int) -> tuple[list[Task], list[Task]]:
    """Training tasks and held-out ones, a third of each from every group, in mixed order.

    Args:
        texts: licences by SPDX id; training and held-out ones are of different families.
        train, held_out: the numbers of tasks.
        seed: for the choice and order of the training tasks; the held-out ones are always the same.

    Raises:
        ValueError: a count that is no multiple of 3, or more tasks than the texts give.
    """
    for count in (train, held_out):
        if count < 0 or count % len(GROUPS):
            raise ValueError(f"{count} tasks cannot be shared equally by {len(GROUPS)} groups")
    train_clauses, held_out_clauses = split(texts)
    return (
        _tasks(train_clauses, train, random.Random(seed), "to train on"),
        _tasks(held_out_clauses, held_out, random.Random(0), "held out"),
    )


def _tasks(clauses: list[Clause], count: int, rng: random.Random, side: str) -> list[Task]:
    each = count // len(GROUPS)
    terms = [replace(clause, text=part) for clause in clauses for part in term.passages(clause.text)]
    tasks = _drawn("term", terms, _term, each, rng, side)
    tasks += _drawn("summary", list(filter(_is_informative, clauses)), _summary, each, rng, side)
    tasks += _permissions(clauses, each, rng, side)
    rng.shuffle(tasks)
    return tasks


def _drawn(
    group: str,
    candidates: list[Candidate],
    ask: Callable[[Candidate, random.Random], Task | None],
    count: int,
    rng: random.Random,
    side: str,
) -> list[Task]:
    """`count` different tasks, from as many different candidates as possible."""
    tasks: dict[str, Task] = {}
    for candidate in _in_turn(candidates, TIMES_ASKED[group], rng):
        if len(tasks) == count:
            break
        task = ask(candidate, rng)
        if task and len(task.prompt) <= MAX_CHARACTERS:
            tasks.setdefault(task.prompt, task)
    if len(tasks) < count:
        raise ValueError(f"{count} {group} tasks {side} are wanted, the texts give {len(tasks)}")
    return list(tasks.values())


def _in_turn(candidates: list[Candidate], times: int, rng: random.Random) -> Iterator[Candidate]:
    """The candidates in random order, all of them `times` times; those similar to an earlier one come last."""
    shuffled = rng.sample(candidates, len(candidates))
    similar: Counter = Counter()
    ranks = []
    for index, candidate in enumerate(shuffled):
        key = _similarity_key(candidate)
        ranks.append((similar[key], index))
        similar[key] += 1
    for _ in range(times):
        for _, index in sorted(ranks):
            yield shuffled[index]


def _similarity_key(candidate: Clause | Action) -> str:
    """Equal for candidates that would give nearly the same question."""
    if isinstance(candidate, Action):
        return candidate.phrase.lower()
    return candidate.heading.lower() if _is_informative(candidate) else opening(candidate.text)


def _prompt(clause: Clause, question: str) -> str:
    return f"Clause: {clause.text}\n\n{question}"


def _term(clause: Clause, rng: random.Random) -> Task:
    question, answer, key = term.question(term.find(clause.text), rng)
    return Task("term", _prompt(clause, question), answer, key, clause.source, 1)


# Headings that name a part of a licence, not its subject; names; headings that different clauses have.
_VAGUE = re.compile(
    r"\b(misc|general|defin|preamble|notes?$|note\b|exhibit|appendix|addendum|important|introduction|background|glossary"
    r"|statement of purpose|conditions?$|terms?$|terms and|effect$|notice$|you\b|api|scope|other\b|instructions|apple"
    r"|sugar|tmate|vim|w3c|gpl|gnu|mozilla|sgi|creative|vim|legend|year|contents|using|over the|license$|licence$"
    r"|offer from|public license|certain|additional term|basic|summary|schedule)",
    re.IGNORECASE,
)
_SMALL = frozenset("and or of to the for on with by in as a from under no not for your this".split())


def _is_informative(clause: Clause) -> bool:
    """Whether the heading can be inferred from the clause: most of its words occur in it."""
    words = [word for word in normalised(clause.heading).split() if word not in _SMALL]
    if not words or len(words) > 5 or _VAGUE.search(clause.heading) or re.search(r"[^A-Za-z ,'-]", clause.heading):
        return False
    body = {word[:5] for word in normalised(clause.text).split()}
    return 2 * sum(word[:5] in body for word in words) >= len(words)


def _summary(clause: Clause, rng: random.Random) -> Task:
    heading = clause.heading.lower().capitalize()
    question = "What is this clause about? Answer with a heading for it, a few words long."
    return Task("summary", _prompt(clause, question), f"{heading}.", heading, clause.source, 0)


_ASKED = (
    "Does this clause allow you to {}?",
    "According to this clause, are you allowed to {}?",
    "You want to {}. Does this clause allow it?",
)


def _permissions(clauses: list[Clause], count: int, rng: random.Random, side: str) -> list[Task]:
    """A third each of questions about what is allowed, what is forbidden, and what the clause does not mention."""
    found = list(all_actions(clauses))
    tasks = []
    for index, key in enumerate(("no", "yes")):
        of_key = [action for action in found if action.key == key]
        tasks += _drawn("permission", of_key, _permission, (count + index) // 3, rng, side)

    def unsaid(action: Action, rng: random.Random) -> Task | None:
        # About the same clauses as the other questions, so that the clause does not give the answer away.
        others = [other for other in found if silent_about(action.clause, other)]
        if not others:
            return None
        return _asked(action.clause, rng.choice(others).phrase, UNSAID, "unsaid", rng)

    return tasks + _drawn("permission", found, unsaid, count - len(tasks), rng, side)


def _permission(action: Action, rng: random.Random) -> Task:
    answer = f'{action.key.capitalize()}. The clause says: "{action.quote.replace(chr(34), chr(39))}"'
    return _asked(action.clause, action.phrase, answer, action.key, rng)


def _asked(clause: Clause, phrase: str, answer: str, key: str, rng: random.Random) -> Task:
    question = f"{rng.choice(_ASKED).format(phrase)} Answer yes, no, or that the clause does not say."
    return Task("permission", _prompt(clause, question), answer, key, clause.source, 0)


def score(task: Task, text: str) -> float:
    """The score of an answer, 0 or 1; for headings the F1 of the words in common."""
    if task.group == "term":
        return float(given_number(text) == task.key)
    if task.group == "permission":
        return float(verdict(text) == task.key)
    return _shared_words(task.key, text)


def _shared_words(heading: str, text: str) -> float:
    """The F1 score of the words, counted with repetitions."""
    first_line = text.strip().partition("\n")[0]
    expected, given = (Counter(normalised(words).split()) for words in (heading, first_line))
    shared = (expected & given).total()
    return 2 * shared / (expected.total() + given.total()) if shared else 0.0
