"""The forgetting benchmark's clauses and tasks: how licences are cut, split, asked about, and answers scored."""

import random
import re

import pytest
from toy_licences import TEXTS, clause, digest, licence

from gci_kernels.bench.forgetting import clauses, domain, numbers, permission, sources, term
from gci_kernels.bench.forgetting.clauses import Clause
from gci_kernels.bench.models import load_tokenizer

WORDS_20 = "which is the kind of thing that people write when they have to fill a clause with some words"


@pytest.mark.parametrize(
    ("text", "heading", "body"),
    [
        (f"3.2. Export Control. The work, {WORDS_20}.", "Export Control", f"The work, {WORDS_20}."),
        (f"7) Export Control\n  The work, {WORDS_20};\n", "Export Control", f"The work, {WORDS_20}."),
        (f"EXPORT CONTROL\n\n(a) The \u201cwork\u201d, {WORDS_20}; and", "EXPORT CONTROL", f'The "work", {WORDS_20}.'),
        (f"The  work,\n{WORDS_20}.", "", f"The work, {WORDS_20}."),
    ],
)
def test_a_clause_has_the_heading_before_it(text: str, heading: str, body: str) -> None:
    assert list(clauses.clauses("Toy", text)) == [Clause("Toy", heading, body)]


@pytest.mark.parametrize(
    "text",
    [
        "The work is short.",
        f"the work, {WORDS_20}.",
        f"The work, {WORDS_20}, as follows:",
        f"The work, {WORDS_20.upper()}.",
        f"The work of [name], {WORDS_20}.",
        f"The work of M\ufffdller, {WORDS_20}.",
        f"The work at http://toy, {WORDS_20}.",
        f"The work, {WORDS_20}. B. The other one.",
        f"The work, {', '.join([WORDS_20] * 7)}.",
    ],
)
def test_what_cannot_be_read_alone_is_no_clause(text: str) -> None:
    assert not list(clauses.clauses("Toy", text))


def test_long_paragraphs_are_cut_between_sentences() -> None:
    found = list(clauses.clauses("Toy", "Scope. " + " ".join(f"Work {n}, {WORDS_20}." for n in range(10))))
    assert [c.heading for c in found] == ["Scope", "", "", ""] and all(c.text.endswith(".") for c in found)
    assert " ".join(c.text for c in found).count("Work") == 10


def test_sentences_keep_abbreviations_and_quotes_whole() -> None:
    text = 'Made by Toys, Inc. The "Work." Any part (e.g. A) is free. End.'
    assert clauses.sentences(text) == ['Made by Toys, Inc. The "Work."', "Any part (e.g. A) is free.", "End."]


def test_families() -> None:
    ids = ("LGPL-2.1", "AGPL-3.0", "CC-BY-4.0", "NPL-1.1", "CPAL-1.0", "BSD-3-Clause", "GPLX-1", "Toy")
    expected = ["gpl", "gpl", "cc", "mpl", "mpl", "permissive", "permissive", "permissive"]
    assert [clauses.family(name) for name in ids] == expected


def test_no_sentence_is_on_both_sides() -> None:
    shared = f"Nobody who holds the work in hand may keep it, {WORDS_20}."
    texts = {
        "GPL-1.0": f"First of all, {WORDS_20}. {shared}",
        "MIT": f"Apart from that, nobody knows who made it, nor when it was first sold, nor where.\n\n{shared}",
        # Its second sentence alone begins as one that is held out does; it has few of that one's phrases.
        "X11": "As an aside, toys last. Nobody who holds the work in hand may then be sure, say those that were asked "
        "last spring, how many more of its wheels will break before the next one is sent out to replace them.",
    }
    train, held_out = clauses.split(texts)
    assert [c.source for c in held_out] == ["GPL-1.0"]
    # MIT's second clause and X11's begin a sentence as GPL's does.
    assert [(c.source, c.text[:5]) for c in train] == [("MIT", "Apart")]


def test_what_borrows_from_a_held_out_clause_is_not_trained_on() -> None:
    borrowed = "the claimant tells the holder of the work in writing, and waits for thirty days before going on"
    texts = {
        "GPL-1.0": f"After that, {borrowed}.",
        "MIT": f"Where no one objects, {borrowed}.",
        "X11": f"The claimant tells the holder of the work what is known of its makers, {WORDS_20}.",
    }
    assert [c.source for c in clauses.split(texts)[0]] == ["X11"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("within thirty (30) days after it", (30, "day")),
        ("at least three years from now", (3, "year")),
        ("no less than thirty six (36) months", (36, "month")),
        ("a ninety-day period", (90, "day")),
        ("fifty percent (50%) or more", (50, "percent")),
        ("twelve (12) months or 12 months", (12, "month")),
        ("within 30 days, or 60 days", None),
        ("within 30 days of 50% of it", None),
        ("for one year", None),
        ("in these days, sections 3 and 4", None),
    ],
)
def test_terms_that_stand_alone_are_found(text: str, found: tuple[int, str] | None) -> None:
    assert term.find(text) == found


@pytest.mark.parametrize("found", [(30, "day"), (2, "week"), (12, "month"), (3, "year"), (50, "percent")])
def test_term_answers_calculate_right(found: tuple[int, str]) -> None:
    seen = set()
    for seed in range(60):
        asked, answer, key = term.question(found, random.Random(seed))
        left, operator, right = re.search(r"(\d+)(?: ([+x-]) |% of )(\d+) =", answer).groups()
        values = {"+": int(left) + int(right), "-": int(left) - int(right), "x": int(left) * int(right)}
        assert values.get(operator, int(left) * int(right) / 100) == int(key) == int(numbers.given_number(answer))
        assert str(found[0]) in (left, right) and {left, right} - {str(found[0])} <= {
            *re.findall(r"\d+", asked),
            *"234",
        }
        assert answer.startswith(f"The clause gives {found[0]} {found[1]}")
        seen.add(operator)
    assert found[1] == "percent" or {"+", "x"} <= seen


@pytest.mark.parametrize(
    ("text", "phrase", "key"),
    [
        ("You may sell copies of the Work, provided that you say so.", "sell copies of the Work", "yes"),
        ("Licensee is permitted to copy the Work in Germany.", "copy the Work in Germany", "yes"),
        ("Permission is hereby granted to use the Work.", "use the Work", "yes"),
        ("You may use, copy, and modify the Work.", "use, copy, and modify the Work", "yes"),
        ("You may not remove the notice unless asked.", "remove the notice", "no"),
        ("The name Toy must not be used to promote copies.", "use the name Toy to promote copies", "no"),
        ("This notice may not be removed or altered.", "remove or alter this notice", "no"),
        (
            "Neither the name of Toy, nor the names of others, may be used to promote copies.",
            "use the name of Toy or the names of others to promote copies",
            "no",
        ),
    ],
)
def test_actions_are_found(text: str, phrase: str, key: str) -> None:
    (action,) = permission.actions(clause(text))
    assert (action.phrase, action.key, action.quote) == (phrase, key, text)


@pytest.mark.parametrize(
    "text",
    [
        "If you may not copy the Work, you stop.",
        "If you lack them you may not copy the Work.",
        "This limit may not apply to you at all.",
        "You may be asked to return the Work.",
        "You may copy it freely.",
        "You may only copy the whole Work.",
        "You may copy the Work at home. You may not copy the Work abroad.",
        "To do so must not be used to promote copies.",
        "You must keep the notice in the Work.",
    ],
)
def test_what_makes_no_fair_question_is_no_action(text: str) -> None:
    assert not permission.actions(clause(text))


@pytest.mark.parametrize(
    ("text", "silent"),
    [
        ("The notice stays where the reader finds it.", True),
        ("Nobody sells the Work.", False),
        ("Drawings are kept in a drawer.", False),
        ("The notice is for any purpose.", False),
    ],
)
def test_silence_is_about_verbs_words_and_broad_grants(text: str, silent: bool) -> None:
    (action,) = permission.actions(clause("You may sell printed drawings of the machine."))
    assert permission.silent_about(clause(text), action) is silent


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes. The clause says so.", "yes"),
        ("yes, it does", "yes"),
        ("No.", "no"),
        ("No, you may not.", "no"),
        ("The clause does not say.", "unsaid"),
        ("This clause doesn\u2019t say", "unsaid"),
        ("Nothing here tells.", ""),
        ("Not that I know: yes.", ""),
        ("I say no", ""),
        ("", ""),
    ],
)
def test_verdicts_are_in_the_opening(answer: str, expected: str) -> None:
    assert permission.verdict(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("12 + 30 = 42.", "42"),
        ("The answer is 42", "42"),
        ("12 + 30 = 42, which is day 42 of 365.", "42"),
        ("30 + 12 is 42.0", "42"),
        ("It is 1,042 in all.", "1042"),
        ("12 - 30 = -18", "-18"),
        ("so it is 12-30", "30"),
        ("it makes -18", "-18"),
        ("It is forty-two.", "42"),
        ("twelve plus thirty is forty two", "42"),
        ("seventeen", "17"),
        ("I do not know.", ""),
    ],
)
def test_the_number_that_an_answer_gives(answer: str, expected: str) -> None:
    assert numbers.given_number(answer) == expected


def test_numbers_in_words_are_read_back() -> None:
    assert all(numbers.given_number(numbers.in_words(n)) == str(n) for n in range(100))


def test_headings_that_the_clause_does_not_tell_are_left_out() -> None:
    text = "The exporter obeys all laws that control exports."
    assert domain._is_informative(clause(text, "Export Control"))
    for heading in ("", "Miscellaneous", "Disclaimer of Warranty", "EXPORT CONTROL 1999", "Definitions of Export"):
        assert not domain._is_informative(clause(text, heading))


def test_scores() -> None:
    def task(group: str, key: str) -> domain.Task:
        return domain.Task(group, "", "", key, "Toy", 0)

    heading = task("summary", "Limitation of liability")
    answers = {
        "limitation of LIABILITY.\nAnd so on": 1,
        "Limitation": 0.5,
        "Liability of the limitation": 6 / 7,
        "No": 0,
    }
    assert {answer: domain.score(heading, answer) for answer in answers} == pytest.approx(answers)
    assert domain.score(heading, "") == 0
    for group, key, right, wrong in (
        ("term", "42", "12 + 30 = 42.", "12 + 30 = 41, not 42"),
        ("permission", "unsaid", "The clause does not say.", "No."),
    ):
        assert domain.score(task(group, key), right) == 1 and domain.score(task(group, key), wrong) == 0
        assert domain.score(task(group, key), right) == 1 and domain.score(task(group, key), wrong) == 0


def test_tasks_are_shared_equally_and_their_own_answers_are_right() -> None:
    train, held_out = domain.make(TEXTS, train=27, held_out=9, seed=0)
    for tasks, each in ((train, 9), (held_out, 3)):
        assert [sum(task.group == group for task in tasks) for group in domain.GROUPS] == [each] * 3
        keys = [task.key for task in tasks if task.group == "permission"]
        assert [keys.count(key) for key in ("yes", "no", "unsaid")] == [each // 3] * 3
        assert len({task.prompt for task in tasks}) == len(tasks)
        assert all(domain.score(task, task.answer) == 1 for task in tasks)
        assert all(task.task_type == (task.group == "term") for task in tasks)
    assert {task.source.startswith("GPL") for task in held_out} == {True}
    assert not any(task.source.startswith("GPL") for task in train)
    assert any(task.answer.endswith("Notices.") or task.answer.endswith("notices.") for task in train)


def test_seeds_change_what_is_trained_on_alone() -> None:
    shuffled = dict(sorted(TEXTS.items(), reverse=True))
    (first, held_out), (again, same), (other, still_same) = (
        domain.make(texts, train=18, held_out=9, seed=seed) for texts, seed in ((TEXTS, 1), (shuffled, 1), (TEXTS, 2))
    )
    assert held_out == same == still_same and first == again and first != other
    # The same with every version of Python.
    assert digest((first, held_out)) == "008c2649ed57a67b3dbf7d96d8e98b58e5ab0022613f048823baadb51be33714"


def test_too_few_texts_and_uneven_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="10 tasks cannot be shared equally by 3 groups"):
        domain.make(TEXTS, train=10, held_out=9, seed=0)
    with pytest.raises(ValueError, match=r"20 summary tasks to train on are wanted, the texts give 16"):
        domain.make(TEXTS, train=60, held_out=9, seed=0)
    with pytest.raises(ValueError, match="term tasks held out are wanted, the texts give 0"):
        domain.make({"MIT": licence("Anchor")}, train=0, held_out=3, seed=0)


@pytest.fixture(scope="module")
def real() -> tuple[list[domain.Task], list[domain.Task]]:
    return domain.make(sources.licences(), train=600, held_out=90, seed=0)


@pytest.mark.slow
def test_real_tasks_do_not_leak(real) -> None:
    train, held_out = real
    assert (len(train), len(held_out)) == (600, 90)
    families = [{clauses.family(task.source) for task in tasks} for tasks in real]
    assert not families[0] & families[1]
    texts = [[task.prompt.removeprefix("Clause: ").partition("\n\n")[0] for task in tasks] for tasks in real]
    unseen = {clauses.opening(sentence) for text in texts[1] for sentence in [text, *clauses.sentences(text)]}
    seen = {clauses.opening(sentence) for text in texts[0] for sentence in [text, *clauses.sentences(text)]}
    assert not {start for start in seen & unseen if start.count(" ") == 7}
    assert all(domain.score(task, task.answer) == 1 for task in train + held_out)


@pytest.mark.slow
def test_real_tasks_are_the_same_everywhere(real) -> None:
    assert digest(real) == "4cef8c56845465f01ab8da97e2691fd80e99a3f12303ddb2a359da650c370170"
    assert domain.make(sources.licences(), train=300, held_out=90, seed=1)[1] == real[1]


@pytest.mark.slow
def test_real_prompts_are_short(real) -> None:
    tokenizer = load_tokenizer("smollm2")
    lengths = [len(tokenizer(task.prompt)["input_ids"]) for tasks in real for task in tasks]
    assert max(lengths) <= 220 and 80 <= sum(lengths) / len(lengths) <= 130
