"""Mixtures: exact counts, which prompt stands where, the same bytes everywhere; trainers take them."""

import hashlib
import json
from fractions import Fraction

import datasets
import pytest
import toy_rega as toy
import toy_training
from hypothesis import given
from hypothesis import strategies as st
from trl import SFTConfig, SFTTrainer

from gci_kernels.rega import Mixture, Pair, Roles, encode, mixture, write_mixture

pytestmark = pytest.mark.usefixtures("one_thread")
GENERAL = [Pair(f"g{i}", f"general {i}") for i in range(5)]
DOMAINS = {"law": [(f"l{i}", f"law {i}") for i in range(10)], "health": [Pair(f"h{i}", f"é {i}") for i in range(4)]}


def system(example) -> str:
    assert example["messages"][0]["role"] == "system"
    return example["messages"][0]["content"]


def instructions(examples, part, domain) -> list[str]:
    found = [e["messages"][-2]["content"] for e in examples if (e["part"], e["domain"]) == (part, domain)]
    assert len(set(found)) == len(found)
    return sorted(found)


def test_every_pair_is_there_under_its_prompt():
    made = mixture(GENERAL, DOMAINS, toy.ROLES, integration=0.25)
    assert (made.counts.general, made.counts.total) == (5, 5 + 14 + 3 + 1)
    assert made.counts.domains == {"law": 10, "health": 4} and made.counts.integrated == {"law": 3, "health": 1}
    assert len(made.examples) == made.counts.total
    assert instructions(made.examples, "general", "") == [f"g{i}" for i in range(5)]
    for name, pairs in DOMAINS.items():
        every = [pair.instruction if isinstance(pair, Pair) else pair[0] for pair in pairs]
        assert instructions(made.examples, "domain", name) == every
        assert set(instructions(made.examples, "integration", name)) < set(every)
    for example in made.examples:
        own = example["part"] == "domain"
        assert system(example) == (toy.ROLES.domains[example["domain"]] if own else toy.ROLES.central)
        _, user, assistant = example["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"][1:] == assistant["content"].split()[1]
        word = {"": "general", "law": "law", "health": "é"}[example["domain"]]
        assert user["content"][0] == {"general": "g", "law": "l", "é": "h"}[word]
        assert assistant["content"].split()[0] == word


@given(
    st.integers(1, 9), st.dictionaries(st.sampled_from("abcd"), st.integers(1, 60), min_size=1),
    st.integers(0, 1000), st.integers(0, 3),
)  # fmt: skip
def test_counts(general, sizes, thousandths, seed):
    """Of n, n * thousandths / 1000 rounded, halves up, in whole numbers."""
    roles = Roles("c", {name: name for name in "abcd"})
    domains = {name: [(f"{name}{i}", "x") for i in range(size)] for name, size in sizes.items()}
    made = mixture([("g", "x")] * general, domains, roles, integration=thousandths / 1000, seed=seed)
    expected = {name: (2 * size * thousandths + 1000) // 2000 for name, size in sizes.items()}
    assert made.counts.general == general and made.counts.domains == sizes and made.counts.integrated == expected
    assert made.counts.total == len(made.examples) == general + sum(sizes.values()) + sum(expected.values())
    for name in sizes:
        assert len(instructions(made.examples, "domain", name)) == sizes[name]
        drawn = instructions(made.examples, "integration", name)
        assert len(drawn) == expected[name] and set(drawn) <= {pair[0] for pair in domains[name]}


@pytest.mark.parametrize(
    ("share", "size", "expected"), [(0.1, 5, 1), (0.1, 4, 0), (0.29, 50, 15), (0.15, 10, 2), (0, 9, 0), (1, 9, 9)]
)
def test_halves_are_rounded_up(share, size, expected):
    made = mixture([("g", "x")], {"law": [("q", "x")] * size}, toy.ROLES, integration=share)
    assert made.counts.integrated == {"law": expected}
    assert expected == int(Fraction(str(share)) * size + Fraction(1, 2))


def written(path, **changes) -> str:
    made = mixture(**{"general": GENERAL, "domains": DOMAINS, "roles": toy.ROLES, "integration": 0.25} | changes)
    write_mixture(made, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    """Those that every version of Python and every machine gives."""
    path = tmp_path / "x.jsonl"
    assert written(path) == "3660d36f7d91265245bc794cb687805d74516e02714eb811d5639f03a73434c0"
    assert written(path, domains=dict(reversed(DOMAINS.items()))) == written(path)
    assert len({written(path, seed=seed) for seed in range(5)}) == 5
    drawn = [mixture(GENERAL, DOMAINS, toy.ROLES, integration=0.3, seed=seed).examples for seed in range(5)]
    assert len({tuple(instructions(examples, "integration", "law")) for examples in drawn}) > 1


def test_examples_are_shuffled():
    parts = [example["part"] for example in mixture(GENERAL, DOMAINS, toy.ROLES).examples]
    assert sum(before != after for before, after in zip(parts, parts[1:], strict=False)) > 4


@pytest.mark.parametrize("template", ["drops", "raises"])
def test_without_a_system_turn(template):
    made = mixture(GENERAL, DOMAINS, toy.ROLES, tokenizer=toy.tokenizer(toy.TEMPLATES[template]))
    for example in made.examples:
        user, assistant = example["messages"]
        prompt = toy.ROLES.domains[example["domain"]] if example["part"] == "domain" else toy.ROLES.central
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"].startswith(f"{prompt}\n\n")
    assert mixture(GENERAL, DOMAINS, toy.ROLES, tokenizer=toy.tokenizer()) == mixture(GENERAL, DOMAINS, toy.ROLES)


def test_a_file_holds_the_examples(tmp_path):
    made, path = mixture(GENERAL, DOMAINS, toy.ROLES), tmp_path / "x.jsonl"
    write_mixture(made, path)
    data = path.read_bytes()
    assert [json.loads(line) for line in data.decode().splitlines()] == made.examples
    assert b"\r" not in data and data.endswith(b"}\n") and "é 1".encode() in data
    assert datasets.Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache")).to_list() == made.examples


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    made, path = mixture(GENERAL, DOMAINS, toy.ROLES), tmp_path / "x.jsonl"
    broken = Mixture([*made.examples, {"messages": {1, 2}}], made.counts)
    with pytest.raises(TypeError):
        write_mixture(broken, path)
    assert not list(tmp_path.iterdir())
    path.write_text("before")
    with pytest.raises(TypeError):
        write_mixture(broken, path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general": []}, "general has no pairs"),
        ({"domains": {}}, "domains must hold at least one domain's pairs"),
        ({"domains": {"law": [("q", "a")], "health": []}}, "domain 'health' has no pairs"),
        ({"domains": {"finance": [("q", "a")]}}, "domain 'finance' has no role prompt; there are some for health, law"),
        ({"integration": -0.1}, "integration must be from 0 to 1, got -0.1"),
        ({"integration": 1.1}, "integration must be from 0 to 1, got 1.1"),
        ({"integration": float("nan")}, "integration must be from 0 to 1, got nan"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"general": [("q", "a"), ("q",)]}, "general, pair 1: must be a Pair or (instruction, answer)"),
        ({"general": [("q", "a"), "qa"]}, "general, pair 1: must be a Pair or (instruction, answer)"),
        ({"domains": {"law": [("q", " ")]}}, "domain 'law', pair 0: the answer must be a string with text"),
        ({"domains": {"law": [Pair("", "a")]}}, "domain 'law', pair 0: the instruction must be a string with text"),
        ({"domains": {"law": [("q", 3)]}}, "domain 'law', pair 0: the answer must be a string with text in it, got 3"),
        ({"tokenizer": toy.tokenizer(None)}, "no chat template"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError) as error:
        mixture(**{"general": GENERAL, "domains": DOMAINS, "roles": toy.ROLES} | changes)
    assert message in str(error.value)


def words(number: int) -> str:
    return " ".join(toy.WORDS[(3 * number + step) % len(toy.WORDS)] for step in range(3 + number % 3))


def test_trl_trains_on_a_mixture(tmp_path):
    domains = {name: [(words(i), words(i + 7)) for i in range(4)] for name in DOMAINS}
    made = mixture([(words(i), words(i + 3)) for i in range(8)], domains, toy.ROLES, integration=0.25)
    model, tokenizer = toy_training.fused("lora"), toy.tokenizer()
    arguments = SFTConfig(**toy_training.settings(tmp_path, max_steps=1, bf16=False, max_length=64))
    trainer = SFTTrainer(
        model, arguments, train_dataset=datasets.Dataset.from_list(made.examples), processing_class=tokenizer
    )
    assert len(trainer.train_dataset) == made.counts.total
    expected = [encode(tokenizer, example["messages"])["input_ids"] for example in made.examples]
    assert sorted(trainer.train_dataset["input_ids"]) == sorted(expected)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert trainer.train().training_loss > 0
    assert any(not before[name].equal(value) for name, value in model.state_dict().items())
