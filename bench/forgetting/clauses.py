"""Licence texts, cut into clauses of a readable length, and split into training and held-out ones by family."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

WORDS = range(15, 111)  # the length of a clause
OPENING = 8  # the words by which two sentences are compared
# The share of its n-grams of words that a training clause may have in common with held-out ones.
NGRAM = 5
MOST_SHARED = 0.25

# Families of licences with common passages, by the beginnings of their ids. All others are one more family: most are
# variants of the BSD and MIT licences.
FAMILIES = {
    "gpl": "GPL LGPL AGPL GFDL NGPL LGPLLR OCLC BSD-Protection",
    "cc": "CC CC0 ADSL",
    "mpl": "MPL NPL CPAL SPL CUA RPSL RPL RSCPL SISSL NOSL SugarCRM ErlPL CDDL Interbase Nokia Motosoto OSET APSL YPL "
    "Zimbra gSOAP NASA CATOSL Frameworx OPL SGI Watcom BitTorrent TMate FreeImage TOSL SNIA VSL RHeCos SCEA Naumen "
    "OCCT JasPer",
    "osl": "OSL NPOSL AFL",
    "ibm": "IPL CPL EPL LPL IPA",
    "artistic": "Artistic ClArtistic",
    "lppl": "LPPL",
    "eupl": "EUPL CECILL",
}
# Chosen because they have enough clauses of every kind and share few of them with the others.
HELD_OUT = frozenset({"artistic", "eupl", "gpl", "osl"})


@dataclass(frozen=True)
class Clause:
    """A passage of a licence, and its heading ("" where it has none), which is not in the text."""

    source: str
    heading: str
    text: str


def family(licence: str) -> str:
    """The family of the licence with this SPDX id; "permissive" for all that are in no list."""
    for name, starts in FAMILIES.items():
        if any(licence == start or licence.startswith(f"{start}-") for start in starts.split()):
            return name
    return "permissive"


def split(texts: dict[str, str]) -> tuple[list[Clause], list[Clause]]:
    """The training clauses and the held-out ones of `texts` by SPDX id, always in the same order.

    As licences of different families have copied from each other, a training clause has no sentence that begins like a
    held-out one, and few n-grams in common with held-out clauses. No text occurs twice.
    """
    train: list[Clause] = []
    held_out: list[Clause] = []
    for source in sorted(texts):
        (held_out if family(source) in HELD_OUT else train).extend(clauses(source, texts[source]))
    starts = {start for clause in held_out for start in openings(clause.text)}
    ngrams = {ngram for clause in held_out for ngram in _ngrams(clause.text)}
    train = [
        clause
        for clause in train
        if starts.isdisjoint(openings(clause.text))
        and len(ngrams & _ngrams(clause.text)) <= MOST_SHARED * len(_ngrams(clause.text))
    ]
    return _distinct(train), _distinct(held_out)


def _distinct(found: Iterable[Clause]) -> list[Clause]:
    """One clause for each text, if possible one with a heading."""
    best: dict[str, Clause] = {}
    for clause in found:
        text = normalised(clause.text)
        if text not in best or (clause.heading and not best[text].heading):
            best[text] = clause
    return list(best.values())


def normalised(text: str) -> str:
    """The words of the text in lower case, without punctuation, separated by spaces."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def opening(text: str) -> str:
    """The first OPENING words, normalised."""
    return " ".join(normalised(text).split()[:OPENING])


def openings(text: str) -> set[str]:
    """The first words of the text and of each of its sentences that is long enough to have an opening."""
    starts = {opening(sentence) for sentence in sentences(text)}
    return {opening(text)} | {start for start in starts if start.count(" ") == OPENING - 1}


def _ngrams(text: str) -> set[tuple[str, ...]]:
    """All runs of NGRAM words in the text."""
    words = normalised(text).split()
    return set(zip(*(words[start:] for start in range(NGRAM)), strict=False))


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph; abbreviations do not end one."""
    return re.split(
        r"(?<![ .(][A-Za-z]\.)(?<!\bInc\.)(?<!\bNo\.)(?<!\betc\.)(?:(?<=[.?!])|(?<=[.?!][\")]))\s+(?=[A-Z\"(])", text
    )


_ENUMERATOR = (
    r"(?:(?:Section|Article|SECTION|ARTICLE)\s+)?"
    r"(?:\(?(?:\d+(?:\.\d+)*|[a-zA-Z]|[ivxIVX]+)[.):]+|\d+(?:\.\d+)+|[-*o\u2022\u2013])\s+"
)
_TITLE = r"[A-Z][\w'-]*(?:,? (?:[A-Z(\"][\w'()\"-]*|and|or|of|to|the|for|on|with|by|in|as|a|from|under|&))*"


def clauses(source: str, text: str) -> Iterator[Clause]:
    """The passages of a licence that can be read alone: whole sentences, 15 to 110 words, no lists, few capitals."""
    heading = ""
    for block in re.split(r"\n\s*\n", _plain(text)):
        first, _, rest = block.strip().partition("\n")
        title, body = _titled(" ".join(first.split()), " ".join(rest.split()))
        if not body:
            # A heading alone belongs to the paragraph below it.
            heading = title
            continue
        for piece in _pieces(re.sub(r"[;,](?: and| or)?$|\.\s\(?[A-Za-z]\.$", ".", body)):
            if _readable(piece):
                yield Clause(source, title or heading, piece)
            title = heading = ""


def _plain(text: str) -> str:
    for curly, straight in {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "``": '"', "''": '"'}.items():
        text = text.replace(curly, straight)
    return text


def _titled(first: str, rest: str) -> tuple[str, str]:
    """(heading or "", body or "") of a paragraph, given its first line and the rest."""
    line = re.sub(rf"^(?:{_ENUMERATOR})+", "", first)
    if re.fullmatch(rf"{_TITLE}[.:]?", line) and len(line.split()) <= 8:
        return line.rstrip(".:"), rest
    inside = re.match(rf"({_TITLE})(?:[.:]|\s[-\u2013]{{1,2}})\s+(?=[A-Z\"])", line)
    if inside and len(inside[1].split()) <= 8:
        return inside[1], f"{line[inside.end() :]} {rest}".strip()
    return "", f"{line} {rest}".strip()


def _pieces(body: str) -> Iterator[str]:
    """The body, or groups of its sentences where it is longer than a clause may be."""
    if len(body.split()) in WORDS:
        yield body
        return
    group: list[str] = []
    for sentence in sentences(body):
        if group and len(" ".join([*group, sentence]).split()) > 80:
            yield " ".join(group)
            group = []
        group.append(sentence)
    yield " ".join(group)


# Blanks to fill in, addresses, code, copyright lines, and enumerations inside a paragraph.
_UNREADABLE = re.compile(
    r"[\[\]{}<>|@_=#*~`\\]|https?:|www\.|\(c\)|copyright \d|\s[.,]|\.\.|\d\) .*\d\) |: - |(?:^|[.;:] )[a-z]\. [a-z]",
    re.IGNORECASE,
)


def _readable(text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    return (
        len(text.split()) in WORDS
        and re.fullmatch(r"[A-Z\"][\x20-\x7e\u00a7\u00a9\u2013\u2014]*\.[\")]?", text) is not None
        and sum(c.isupper() for c in letters) < 0.15 * len(letters)
        and not _UNREADABLE.search(text)
    )
