"""General material, none of it legal: instructions to answer, sums, word meanings, and plain text.

A word occurs in one part only: those that instructions ask about are in no multiple choice and in no held-out text.
"""

import itertools
import random
import zlib
from dataclasses import dataclass

from ..fetch import to_stderr
from .numbers import in_words
from .sources import Gloss, Log, documentation, glosses

# A small model hardly knows rarer words before any training.
COMMON = 4500
PARTS = ("instructions", "choices", "held out")

_ABOUT_WORDS = (
    'What does the word "{}" mean?',
    'Use the word "{}" in a sentence.',
    'Explain the word "{}" to a child.',
    'Write two sentences that both contain the word "{}".',
    'Name something that the word "{}" makes you think of, and say why.',
)
_THINGS = (
    "a bicycle, a river, a library, a candle, a bridge, a garden, a mountain, a telephone, a kitchen, a train, "
    "a camera, a forest, a clock, a painting, a song, an island, a market, a newspaper, a window, a farm, a school, "
    "a hospital, a lake, a piano, a boat, a mirror, a map, a coat, a lamp, a spoon, a cat, a horse, "
    "an apple, a storm, a desert"
).split(", ")
_TOPICS = (
    "the sky is blue, leaves fall in autumn, bread rises, ice floats on water, we need sleep, birds fly south in "
    "winter, the moon changes its shape, metal feels cold, onions make us cry, the sea is salty, thunder follows "
    "lightning, cats purr, a rainbow has colours, plants need light, soap cleans our hands, days are longer in summer, "
    "bees visit flowers, iron rusts, we yawn, popcorn pops, a kettle whistles, snow melts, stars twinkle, "
    "milk turns sour"
).split(", ")
_CATEGORIES = (
    "fruits, tools, animals with four legs, musical instruments, countries, colours, sports, kinds of weather, drinks, "
    "vegetables, means of transport, pieces of furniture, insects, birds, planets, jobs, school subjects, clothes, "
    "hobbies, languages, flowers, breakfast foods, things in a kitchen, things that are round"
).split(", ")
_NOTES = (
    "thank a neighbour for a cake, invite a friend to dinner, say that you will be late, ask for a book back, wish "
    "someone a good journey, apologise for a missed call, tell your team that the meeting is moved, congratulate a "
    "cousin on a new job, ask a shop when it opens, remind a flatmate to water the plants, welcome a new colleague, "
    "ask a teacher for more time, tell a guest where the key is, cheer up a friend who is ill"
).split(", ")
_TONES = ("short", "friendly", "formal", "cheerful", "plain")
_STORIES = (
    "Anna has {a} apples and buys {b} more. How many apples does she have now?",
    "A bus carries {a} people and {b} get off. How many people are still on it?",
    "Tom read {a} pages on Monday and {b} pages on Tuesday. How many pages did he read?",
    "A baker made {a} rolls and sold {b}. How many rolls are left?",
    "There are {a} red and {b} blue marbles in a jar. How many marbles are there?",
)
_SIGNS = {"+": "plus", "-": "minus", "x": "times"}
_SUMS = ("What is {}?", "Calculate {}.", "How much is {}?")


@dataclass(frozen=True)
class Choice:
    """A question and four answers to choose from; `right` is the index of the right one."""

    prompt: str
    options: tuple[str, str, str, str]
    right: int


def instructions(count: int, seed: int, *, log: Log = to_stderr) -> list[str]:
    """`count` different everyday instructions of all kinds, in mixed order; ValueError for more than there are."""
    rng = random.Random(seed)
    words = [gloss.word for gloss in _words("instructions", log)]
    kinds = [*([template.format(word) for word in words] for template in _ABOUT_WORDS), *_without_words()]
    for kind in kinds:
        rng.shuffle(kind)
    # One of each kind in turn, until a kind is used up.
    taken = [prompt for row in itertools.zip_longest(*kinds) for prompt in row if prompt is not None]
    _enough("instructions", count, len(taken))
    chosen = taken[:count]
    rng.shuffle(chosen)
    return chosen


def _without_words() -> list[list[str]]:
    numbers = range(12, 60, 5)
    return [
        [story.format(a=a, b=b) for story in _STORIES for a in numbers for b in range(2, 11, 2)],
        [f"{how} why {topic}." for topic in _TOPICS for how in ("Explain", "Say in one sentence")],
        [f"Name {in_words(n)} {category}." for category in _CATEGORIES for n in (2, 3, 4, 5)],
        [f"Write a {tone} note to {note}." for note in _NOTES for tone in _TONES],
        [f"What is the difference between {a} and {b}?" for a, b in itertools.combinations(_THINGS, 2)],
        [f"Describe {thing} in {in_words(n)} sentences." for thing in _THINGS for n in (2, 3)],
    ]


def arithmetic(count: int, seed: int) -> list[Choice]:
    """`count` different sums of one- and two-digit numbers and products of one-digit ones, in digits and in words.

    The wrong answers are near the right one. Multiple choice, because a small model that is asked to calculate often
    explains until its answer is cut off.

    Raises:
        ValueError: there are fewer.
    """
    rng = random.Random(seed)
    sums = [(a, sign, b) for a in range(3, 100) for b in range(2, 100) for sign in "+-" if sign == "+" or a > b]
    products = [(a, "x", b) for a in range(2, 10) for b in range(2, 13)]
    rng.shuffle(sums)
    rng.shuffle(products)
    # Two sums for each product, as long as there are products.
    mixed = [
        item
        for i, pair in enumerate(zip(sums[::2], sums[1::2], strict=False))
        for item in (*pair, *products[i : i + 1])
    ]
    _enough("sums", count, len(mixed))
    choices = [_sum(*item, rng) for item in mixed[:count]]
    rng.shuffle(choices)
    return choices


def _sum(a: int, sign: str, b: int, rng: random.Random) -> Choice:
    result = {"+": a + b, "-": a - b, "x": a * b}[sign]
    expression = f"{in_words(a)} {_SIGNS[sign]} {in_words(b)}" if rng.random() < 0.5 else f"{a} {sign} {b}"
    wrong = [result + step for step in (-10, -2, -1, 1, 2, 10) if result + step > 0]
    numbers = rng.sample([result, *rng.sample(wrong, 3)], 4)
    options = tuple(f"The answer is {number}." for number in numbers)
    return Choice(rng.choice(_SUMS).format(expression), options, numbers.index(result))


def gloss_choices(count: int, seed: int, *, log: Log = to_stderr) -> list[Choice]:
    """Word meanings: the right one and those of three words of the same part of speech, of similar length.

    Raises:
        ValueError: there are fewer than `count`.
    """
    rng = random.Random(seed)
    words = _words("choices", log)
    _enough("choices", count, len(words))
    choices = []
    for gloss in rng.sample(words, len(words)):
        others = [other.gloss for other in words if _is_distractor(gloss, other)]
        if len(choices) < count and len(others) >= 3:
            options = rng.sample([gloss.gloss, *rng.sample(others, 3)], 4)
            prompt = f'What does the word "{gloss.word}" mean?'
            choices.append(Choice(prompt, tuple(options), options.index(gloss.gloss)))
    _enough("choices", count, len(choices))
    return choices


def _is_distractor(gloss: Gloss, other: Gloss) -> bool:
    """Whether the other's meaning can be a wrong answer: neither part of speech nor length give the right one away."""
    near = abs(len(gloss.gloss) - len(other.gloss)) <= 12
    return near and gloss.part_of_speech == other.part_of_speech and gloss.gloss != other.gloss


def held_out_texts(count: int, seed: int, *, log: Log = to_stderr) -> list[str]:
    """Plain texts for the general loss: documentation and word meanings, half each; ValueError if there are fewer."""
    rng = random.Random(seed)
    meanings = [f'The {_NAMES[g.part_of_speech]} "{g.word}" means {g.gloss}.' for g in _words("held out", log)]
    paragraphs = documentation(log)
    half = min(count // 2, len(paragraphs))
    _enough("held-out texts", count, half + len(meanings))
    texts = rng.sample(paragraphs, half) + rng.sample(meanings, count - half)
    rng.shuffle(texts)
    return texts


_NAMES = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}


def _words(part: str, log: Log) -> list[Gloss]:
    """The third of the common words that belongs to one part; the same for every seed and version of Python."""
    index = PARTS.index(part)
    return [gloss for gloss in glosses(log)[:COMMON] if zlib.crc32(gloss.word.encode()) % len(PARTS) == index]


def _enough(what: str, wanted: int, available: int) -> None:
    if wanted > available:
        raise ValueError(f"{wanted} {what} are wanted, there are {available}")
