"""The forgetting benchmark's general material: instructions, choices, arithmetic, plain texts."""

import re

import pytest
from toy_licences import digest

from gci_kernels.bench.forgetting import general, numbers
from gci_kernels.bench.forgetting.sources import Gloss


@pytest.fixture
def words(monkeypatch) -> list[Gloss]:
    made_up = [f"{a}{b}{c}" for a in "bdfglm" for b in "aeiou" for c in ("nt", "rk", "lls", "mp", "st")]
    found = [Gloss(word, "noun" if i % 4 else "verb", f"what is known as {word}") for i, word in enumerate(made_up)]
    monkeypatch.setattr(general, "glosses", lambda log: found)
    monkeypatch.setattr(general, "documentation", lambda log: [f"Paragraph {n} of the guide." for n in range(20)])
    return found


def asked_about(text: str) -> set[str]:
    return set(re.findall(r'"(\w+)"', text))


def test_no_word_has_two_uses(words: list[Gloss]) -> None:
    prompts = general.instructions(500, 0)
    choices = general.gloss_choices(30, 0)
    texts = general.held_out_texts(40, 0)
    options = " ".join(" ".join(f'"{option.split()[-1]}"' for option in choice.options) for choice in choices)
    uses = [asked_about(" ".join(prompts)), asked_about(options), asked_about(" ".join(texts))]
    assert all(len(use) > 20 for use in uses[:2]) and len(uses[2]) == 20
    assert not uses[0] & uses[1] and not uses[0] & uses[2] and not uses[1] & uses[2]
    assert len(set(prompts)) == 500 and len(set(texts)) == 40


def test_choices_hold_the_right_meaning_once_among_words_of_its_kind(words: list[Gloss]) -> None:
    kinds = {gloss.gloss: gloss.part_of_speech for gloss in words}
    choices = general.gloss_choices(30, 0)
    for choice in choices:
        (word,) = asked_about(choice.prompt)
        assert choice.options[choice.right] == f"what is known as {word}" and len(set(choice.options)) == 4
        assert len({kinds[option] for option in choice.options}) == 1
    assert {choice.right for choice in choices} == {0, 1, 2, 3}


def test_arithmetic_is_right_and_varied() -> None:
    questions = general.arithmetic(300, 0)
    assert len({question.prompt for question in questions}) == 300
    for question in questions:
        text = question.prompt
        for number in range(99, -1, -1):
            text = re.sub(rf"\b{numbers.in_words(number)}\b", str(number), text)
        for word, sign in (("plus", "+"), ("minus", "-"), ("times", "x")):
            text = text.replace(word, sign)
        left, sign, right = re.search(r"(\d+) ([+x-]) (\d+)", text).groups()
        values = {"+": int(left) + int(right), "-": int(left) - int(right), "x": int(left) * int(right)}
        assert question.options[question.right] == f"The answer is {values[sign]}." and values[sign] >= 0
        offered = [int(re.search(r"-?\d+", option)[0]) for option in question.options]
        assert len(set(offered)) == 4 and all(
            0 <= number - values[sign] + 10 <= 20 and number >= 0 for number in offered
        )
    assert {question.right for question in questions} == {0, 1, 2, 3}
    counts = [
        sum(sign in q.prompt for q in questions) for sign in (" x ", " times ", " + ", " plus ", " - ", " minus ")
    ]
    assert min(counts) >= 20


def test_general_material_follows_its_seed(words: list[Gloss]) -> None:
    made = [
        (
            general.instructions(50, s),
            general.arithmetic(50, s),
            general.gloss_choices(9, s),
            general.held_out_texts(9, s),
        )
        for s in (0, 0, 1)
    ]
    assert made[0] == made[1] and all(a != b for a, b in zip(made[0], made[2], strict=True))
    assert digest(made[0]) == "025ec6cbd3a2da017d486586e17d4fb47717adf4249c654be5370aa1582fa375"


def test_more_than_there_is_is_refused(words: list[Gloss]) -> None:
    for make in (
        general.instructions,
        general.gloss_choices,
        general.held_out_texts,
        lambda n, s: general.arithmetic(n, s),
    ):
        with pytest.raises(ValueError, match=r"100000 .* are wanted, there are \d+"):
            make(100_000, 0)
