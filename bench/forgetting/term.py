"""Terms in clauses, and calculations with them: "within thirty (30) days", "fifty percent (50%)"."""

import random
import re

from .clauses import WORDS, sentences
from .numbers import in_words

_IN_WORDS = {in_words(n): n for n in range(1, 100)}
_DURATION = re.compile(
    rf"(?:\((\d+)\)|\b(\d+)|\b({'|'.join(sorted(_IN_WORDS, key=len, reverse=True))}))[- ]"
    r"(?:business |working |calendar |full )?(day|week|month|year)s?\b",
    re.IGNORECASE,
)
_PERCENT = re.compile(r"\b(\d+) ?(?:%|percent)", re.IGNORECASE)

_STARTS = {
    "day": (
        (
            "Notice came on day {start} of the year. On which day of the year does the period in the clause end?",
            "The period in the clause begins on day {start} of the year. On which day of the year does it end?",
            "Someone starts to count the period in the clause on day {start}. On which day is it over?",
        ),
        "so it ends on day {end}",
    ),
    "week": (
        ("The period in the clause begins in week {start} of a project. In which week does it end?",),
        "so it ends in week {end}",
    ),
    "month": (
        (
            "The period in the clause begins in month {start} of a project. In which month of the project does it end?",
            "A product was released in month {start} of a plan. In which month does the period in the clause, "
            "counted from then, end?",
        ),
        "so it ends in month {end}",
    ),
    "year": (
        (
            "The period in the clause begins in {start}. In which year does it end?",
            "A copy was handed over in {start}. In which year does the period in the clause, counted from then, end?",
        ),
        "so it ends in {end}",
    ),
}
_SHARES = (
    "A company has {whole} shares. How many shares are the percentage that the clause names?",
    "There are {whole} outstanding shares. How many of them make up the percentage in the clause?",
    "How much is the percentage in the clause if all shares together are {whole}?",
)
_MULTIPLES = {2: "twice", 3: "three times", 4: "four times"}


def find(text: str) -> tuple[int, str] | None:
    """The number and unit of a text's only term, such as (30, "day"); None where it has none or several."""
    durations = {
        (int(match[1] or match[2] or _IN_WORDS[match[3].lower()]), match[4].lower())
        for match in _DURATION.finditer(text)
    }
    percents = {(int(match[1]), "percent") for match in _PERCENT.finditer(text)}
    terms = durations | percents
    (term,) = terms if len(terms) == 1 else (None,)
    return term if term and 2 <= term[0] <= 365 else None


def passages(text: str) -> list[str]:
    """The text, where it has one term; else its sentences that have one and can be read alone."""
    if find(text):
        return [text]
    return [part for part in sentences(text) if find(part) and len(part.split()) in WORDS and part[0].isupper()]


def question(term: tuple[int, str], rng: random.Random) -> tuple[str, str, str]:
    """A calculation with the term: question, answer, and the key to score answers by."""
    number, unit = term
    if unit == "percent":
        return _share(number, rng)
    variant = rng.randrange(4)
    if variant == 0:
        return _multiple(number, unit, rng)
    if variant == 1 and number > 3:
        return _remainder(number, unit, rng)
    wordings, ending = _STARTS[unit]
    start = rng.randint(1995, 2030) if unit == "year" else rng.randint(2, 60)
    end = start + number
    text = rng.choice(wordings).format(start=start)
    sum_ = f"{start} + {number} = {end}"
    return text, f"The clause gives {number} {unit}s. {sum_}, {ending.format(end=end)}.", str(end)


def _multiple(number: int, unit: str, rng: random.Random) -> tuple[str, str, str]:
    factor = rng.choice(sorted(_MULTIPLES))
    result = factor * number
    text = f"The parties agree on {_MULTIPLES[factor]} the period in the clause. How many {unit}s is that?"
    answer = f"The clause gives {number} {unit}s. {factor} x {number} = {result}, so {result} {unit}s."
    return text, answer, str(result)


def _remainder(number: int, unit: str, rng: random.Random) -> tuple[str, str, str]:
    passed = rng.randint(2, number - 2)
    left = number - passed
    text = f"Of the period in the clause, {passed} {unit}s have passed. How many {unit}s are left?"
    left_over = f"{left} {unit} is left" if left == 1 else f"{left} {unit}s are left"
    return text, f"The clause gives {number} {unit}s. {number} - {passed} = {left}, so {left_over}.", str(left)


def _share(number: int, rng: random.Random) -> tuple[str, str, str]:
    whole = 20 * rng.randint(2, 40)
    part = whole * number // 100
    text = rng.choice(_SHARES).format(whole=whole)
    return text, f"The clause gives {number} percent. {number}% of {whole} = {part}, so {part} shares.", str(part)
