"""The number that an answer gives, by which tasks that calculate are scored."""

import re

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_IN_WORDS = {word: value for value, word in enumerate(_UNITS)} | {
    word: 10 * value for value, word in enumerate(_TENS, start=2)
}


def in_words(number: int) -> str:
    """A number from 0 to 99 in words."""
    if number < 20:
        return _UNITS[number]
    tens, units = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_UNITS[units]}" if units else "")


def given_number(answer: str) -> str:
    """The result of an answer's last equation, else the last number in it, else "".

    Models that have not learned the form of the answers repeat the question's numbers before theirs, and add more
    after an equation. Numbers in words count where there are no digits.
    """
    digits = re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer)
    results = re.findall(r"=\s*\$?(-?\d+(?:\.\d+)?)", digits)
    # A minus between two numbers is an operator, not a sign.
    numbers = results or re.findall(r"(?:(?<![\d)] )(?<![\d)])-)?\d+(?:\.\d+)?", digits)
    if numbers:
        return re.sub(r"\.0+$", "", numbers[-1])
    values = re.findall(
        rf"\b(?:(?:{'|'.join(_TENS)})(?:[- ](?:{'|'.join(_UNITS[1:10])}))?|{'|'.join(_UNITS[::-1])})\b", answer.lower()
    )
    return str(sum(_IN_WORDS[word] for word in re.split("[- ]", values[-1]))) if values else ""
