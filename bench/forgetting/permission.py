"""What clauses allow and forbid: finds the actions in their text that a question can be about."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .clauses import Clause, sentences

# Only phrases that start with one of these become questions: they are actions, and the question is grammatical.
_VERBS = frozenset(
    "accept access add aggregate alter apply assign attach bundle call change charge choose claim combine "
    "communicate compile convert convey copy create delete demand deny deploy derive develop disclose display "
    "distribute download embed enforce endorse exercise export extend extract impose include incorporate initiate "
    "install lease lend license link make merge misrepresent modify move offer omit operate perform place prepare "
    "present print produce promote propagate provide publish reference release relicense remove rename rent "
    "represent reproduce republish resell restrict retain revoke sell send share ship sublicense sublicence suggest "
    "supply take transfer translate transmit use view waive".split()
)
_PARTICIPLES = {
    "used": "use", "removed": "remove", "altered": "alter", "called": "call", "misrepresented": "misrepresent",
    "distributed": "distribute", "copied": "copy", "changed": "change", "deleted": "delete", "modified": "modify",
    "sold": "sell", "included": "include", "combined": "combine", "made": "make", "revoked": "revoke", "added": "add",
    "published": "publish", "redistributed": "distribute", "transferred": "transfer",
}  # fmt: skip
_WHO = r"(?:[Yy]ou|(?:[Tt]he |[Aa] )?(?:[Ll]icensee|LICENSEE|[Rr]ecipient|[Uu]ser)s?|[Aa]nyone|[Ee]veryone)"
_ALLOWED = re.compile(
    rf"\b(?:{_WHO} may|{_WHO} (?:are|is) (?:free|permitted|allowed) to|[Pp]ermission is (?:hereby )?granted to"
    rf"|{_WHO} (?:has|have) the right to|grants? {_WHO} [^.;:]{{0,120}}?licen[cs]e to)"
    r"(?: also| then| freely| additionally)? ([a-z].*)"
)
_FORBIDDEN = re.compile(
    rf"\b{_WHO} (?:may not|must not|shall not|cannot|can not|(?:are|is) not (?:permitted|allowed) to"
    r"|agrees? not to)(?: also| then| thereafter)? ([a-z].*)"
)
_PASSIVE = re.compile(
    r"^(?:\w+, )?([A-Z\"][^.;:]*?) (?:may not|must not|shall not|cannot) be (\w+)(?: or (\w+))?\b(.*)"
)
_NEITHER = re.compile(r"^Neither (.*?),? nor (.*?),? (?:may|shall|can|must) be (\w+)(?: or (\w+))?\b(.*)")
_END = re.compile(
    r"[.;:]|, (?:provided|but|so long|as long|unless|except|subject|and (?:you|this|the)|nor)"
    r"| (?:provided|unless|except|so long as|as long as|if|nor|but|in (?:which|such) case|other than|under the terms"
    r"|without|however|except|which|that (?:you|the|is|are)|as (?:set|specified|provided|described|permitted))\b"
)
_DANGLING = frozenset(
    "of on by for in with under to from and or the a an as at any your its promote conclude offer".split()
)
_NO_THING = frozenset("To In If For When As By It They He Once Where Any Such Except Unless".split())
# Words that refer to something outside of the phrase, and remains of sentences that were split wrongly.
_UNCLEAR = re.compile(
    r"\b(?:only|not|any other|thereof|hereunder|so|it|them|such|these|those|who|itself|and to|however"
    r"|ownership rights)\b",
    re.IGNORECASE,
)
_BROAD = re.compile(r"any purpose|without restriction|without limitation|all rights|all ways|any manner|any way", re.I)
_COMMON = frozenset(
    "with from that this your their such under other these those software work works program license licence licensed "
    "code product document package terms version copies copy which than into only same available received".split()
)


@dataclass(frozen=True)
class Action:
    """An action with the licensed work ("sell copies of it"), and what a clause says about it."""

    phrase: str
    key: str  # "yes" or "no"
    quote: str
    clause: Clause


def actions(clause: Clause) -> list[Action]:
    """What the clause allows or forbids explicitly, at most one action for each sentence."""
    found = [Action(*_action(sentence), sentence.rstrip(), clause) for sentence in sentences(clause.text)]
    # "You may copy it ... You may not copy it if ...": neither answer is the right one.
    stated = {(_verb(action.phrase), action.key) for action in found}
    return [
        action
        for action in found
        if _askable(action.phrase)
        and len(action.quote.split()) <= 45
        and (_verb(action.phrase), "yes" if action.key == "no" else "no") not in stated
    ]


def _action(sentence: str) -> tuple[str, str]:
    """(action, "no" or "yes") of a sentence that forbids or allows; ("", "") of any other."""
    forbidden, passive, neither = _FORBIDDEN.search(sentence), _PASSIVE.match(sentence), _NEITHER.match(sentence)
    if neither:
        subject = f"{neither[1]} or {re.sub(',? nor ', ' or ', neither[2])}"
        return _active(subject, *neither.groups()[2:]), "no"
    if forbidden and not re.search(r"\b(?:if|where|when|that|which|unless)\b", sentence[: forbidden.start()], re.I):
        return _without_conditions(forbidden[1]), "no"
    if passive and not forbidden and len(passive[1].split()) <= 14 and passive[1].split()[0] not in _NO_THING:
        return _active(*passive.groups()), "no"
    allowed = _ALLOWED.search(sentence)
    if allowed and not re.search(r"\b(?:not?|nor|only|that|which)\b", sentence[: allowed.start()], re.I):
        return _without_conditions(allowed[1]), "yes"
    return "", ""


def _active(subject: str, participle: str, other: str | None, rest: str) -> str:
    """ "The name X", "used", " to promote it": "use the name X to promote it"."""
    if participle not in _PARTICIPLES or (other and other not in _PARTICIPLES):
        return ""
    verb = _PARTICIPLES[participle] + (f" or {_PARTICIPLES[other]}" if other else "")
    if subject.split()[0] in ("The", "This", "Products", "Names", "Any", "These"):
        subject = subject[0].lower() + subject[1:]
    return f"{verb} {subject} {_without_conditions(rest)}".strip()


def _without_conditions(phrase: str) -> str:
    """The phrase without its conditions; a comma ends it too, unless a list continues after it."""
    end = _END.search(phrase)
    action = phrase[: end.start()] if end else phrase
    for comma in re.finditer(", ", action):
        listed = re.match(r"(?:[\w'/-]+,? ){0,6}(?:and|or|and/or) ", action[comma.end() :])
        if not listed and len(action[: comma.start()].split()) > 3:
            action = action[: comma.start()]
            break
    return re.sub(r",? (?:and|or|and/or)$", "", action.strip(" ,"))


def _verb(phrase: str) -> str:
    return phrase.partition(" ")[0].strip(",")


def _askable(phrase: str) -> bool:
    words = phrase.split()
    return (
        3 <= len(words) <= 24
        and _verb(phrase) in _VERBS
        and words[-1] not in _DANGLING
        and not words[1].startswith(("to", "except"))
        and phrase.count("(") == phrase.count(")")
        and phrase.count('"') % 2 == 0
        and not _UNCLEAR.search(phrase)
    )


def content_words(text: str) -> frozenset[str]:
    """The first five letters of the words that are not frequent in every licence."""
    words = re.findall(r"[a-z]{4,}", text.lower())
    return frozenset(word[:5] for word in words if word not in _COMMON)


def silent_about(clause: Clause, action: Action) -> bool:
    """Whether nothing in the clause concerns the action: none of its verbs or content words, and no broad grant."""
    verbs = [word for word in re.findall("[a-z]+", action.phrase) if word in _VERBS]
    if _BROAD.search(clause.text) or re.search(rf"\b(?:{'|'.join(verb[:5] for verb in verbs)})", clause.text, re.I):
        return False
    return content_words(clause.text).isdisjoint(content_words(action.phrase))


def verdict(answer: str) -> str:
    """ "yes", "no" or "unsaid", by the beginning of an answer; "" where it begins otherwise."""
    opening = " ".join(re.findall(r"[a-z]+", answer.lower().replace("'", "").replace("\u2019", ""))[:8])
    if re.match(r"(?:yes|no)\b", opening):
        return opening.split()[0]
    silent = r"(?:(?:the|this) clause |it )?(?:does not say|doesnt say|says nothing|does not mention|doesnt mention)"
    return "unsaid" if re.match(silent, opening) else ""


def all_actions(clauses: list[Clause]) -> Iterator[Action]:
    """The actions of all clauses, in their order."""
    for clause in clauses:
        yield from actions(clause)
