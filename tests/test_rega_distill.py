"""Distilled answers: what is drawn and what is left out; killed runs; files of others stay untouched."""

import json

import pytest
import torch
import toy_rega as toy
import toy_training
from transformers import GenerationConfig

import gci_kernels
from gci_kernels.rega import Pair, RegaError, distill, read_distilled, read_pairs
from gci_kernels.rega.distilled import read_records

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = dict(prompt=toy.ROLES.central, max_new_tokens=12, batch_size=2, progress=False)


@pytest.fixture
def model():
    return toy.llama()


def run(model, out=None, **changes):
    options = dict(tokenizer=toy.tokenizer(), instructions=toy.INSTRUCTIONS, out=out, **OPTIONS) | changes
    return distill(model, **options)


@pytest.fixture
def calls(model, monkeypatch):
    """What generate() was given."""
    own, seen = model.generate, []

    def generate(**given):
        seen.append(given)
        return own(**given)

    monkeypatch.setattr(model, "generate", generate)
    return seen


def test_answers_are_those_of_generate(model, tmp_path):
    """Each batch again, by hand, from its recorded seed."""
    pairs, tokenizer = run(model, tmp_path / "x.jsonl"), toy.tokenizer()
    records, found = read_records(tmp_path / "x.jsonl"), []
    for first in range(0, 7, 2):
        texts = [f"<system> {toy.ROLES.central} <eos> <user> {text} <eos> <assistant>" for text in toy.INSTRUCTIONS]
        batch = tokenizer(texts[first : first + 2], padding=True, padding_side="left", return_tensors="pt")
        torch.manual_seed(records[first]["seed"])
        made = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=True, temperature=0.7,
            top_p=0.95, top_k=0, max_new_tokens=12,
        )  # fmt: skip
        found += made[:, batch["input_ids"].shape[1] :].tolist()
    for record, row, instruction in zip(records, found, toy.INSTRUCTIONS, strict=True):
        assert record["instruction"] == instruction and record["finished"] == (2 in row)
        assert record["answer"] == tokenizer.decode(row, skip_special_tokens=True).strip()
        assert record["tokens"] == (row.index(2) + 1 if 2 in row else 12)
    assert len({record["seed"] for record in records}) == 4
    assert {record["finished"] for record in records} == {True, False}
    assert pairs == [Pair(r["instruction"], r["answer"]) for r in records if r["dropped"] is None]
    assert pairs == read_distilled(tmp_path / "x.jsonl")


def test_a_file_changes_nothing(model, tmp_path):
    assert run(model) == run(model, tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"temperature": 2.0}, {"top_p": 0.3}, {"prompt": None}, {"batch_size": 3}]
)
def test_what_answers_depend_on(model, changes):
    assert run(model, **changes) != run(model)


def test_greedy_answers_need_no_seed(model):
    assert run(model, temperature=0) == run(model, temperature=0, seed=5) == run(model, temperature=0, batch_size=7)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_the_models_own_settings_have_no_say(model, tmp_path, temperature):
    expected = run(model, temperature=temperature)
    own = GenerationConfig(
        do_sample=True, temperature=3.0, top_k=2, top_p=0.2, min_p=0.4, typical_p=0.3, repetition_penalty=9.0,
        no_repeat_ngram_size=1, num_beams=2, max_length=11, min_new_tokens=9, suppress_tokens=list(range(8, 40)),
        eos_token_id=2, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    model.generation_config = own
    assert run(model, temperature=temperature) == expected
    assert model.generation_config is own


def test_top_k_of_transformers_has_no_say(model, calls):
    run(model)
    assert [call["top_k"] for call in calls] == [0] * 4


def test_all_is_as_it_was(model):
    tokenizer = toy.tokenizer()
    tokenizer.padding_side = "right"
    model.train()
    model.model.layers[0].eval()
    own, modes = model.generation_config, [module.training for module in model.modules()]
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    with pytest.raises(toy.Killed):
        run(model, tokenizer=tokenizer, after=toy.kill_after(4))
    run(model, tokenizer=tokenizer)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes and model.generation_config is own
    assert tokenizer.padding_side == "right"


def test_it_answers_in_evaluation_mode(model):
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    expected = run(model)
    assert run(model.train()) == expected


def test_a_template_without_a_system_turn(model, calls):
    run(model, tokenizer=toy.tokenizer(toy.DROPS), batch_size=1)
    words = toy.tokenizer().convert_ids_to_tokens(calls[0]["input_ids"][0])
    assert " ".join(words) == f"<user> {toy.ROLES.central} what is rent <eos> <assistant>"


def test_a_peft_model_answers_with_its_active_adapters(tmp_path):
    model = gci_kernels.patch(toy.llama(), toy_training.CONFIGS["lora"](0.0)).double()
    model.get_base_model().generation_config.top_k = 1
    with model.disable_adapter():
        untouched = run(model, tmp_path / "x.jsonl")
    assert untouched == run(toy.llama()) != run(model)
    with pytest.raises(RegaError, match="another run's: it has model"):
        run(model, tmp_path / "x.jsonl")


def test_a_killed_run_goes_on(model, tmp_path, calls):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "x.jsonl"
    expected = run(model, whole)
    calls.clear()
    for count in (2, 4, 6):
        with pytest.raises(toy.Killed):
            run(model, out, after=toy.kill_after(count))
        assert len(out.read_text().splitlines()) == 1 + count
        with pytest.raises(RegaError, match=f"unfinished: {count} of 7 answers; run distill again"):
            read_distilled(out)
    assert run(model, out) == run(model, out) == expected
    assert out.read_bytes() == whole.read_bytes() and len(calls) == 4
    assert sorted(tmp_path.iterdir()) == [whole, out]


def test_a_batch_is_on_the_disk_before_the_next_one(model, tmp_path, monkeypatch):
    """A kill or a power cut costs one batch at most: nothing waits in a buffer."""
    out, sizes, synced = tmp_path / "x.jsonl", [], []
    monkeypatch.setattr("os.fsync", lambda _: synced.append(out.stat().st_size))
    run(model, out, after=lambda count: sizes.append((count, out.read_bytes().count(b"\n"), out.stat().st_size)))
    assert [(count, lines) for count, lines, _ in sizes] == [(2, 3), (4, 5), (6, 7), (7, 8)]
    assert len(synced) == 5 and synced[1:] == [size for _, _, size in sizes]


def test_a_run_killed_at_any_byte_goes_on(model, tmp_path):
    """Whatever part of the file was written: a cut line, a cut batch, half of a first line, nothing."""
    out = tmp_path / "x.jsonl"
    expected = run(model, out)
    whole = out.read_bytes()
    places = [0, 1, 40, whole.index(b"\n"), *range(whole.index(b"\n") + 1, len(whole), 37), len(whole) - 1]
    for place in places:
        out.write_bytes(whole[:place])
        assert run(model, out) == expected and out.read_bytes() == whole, place


def test_a_cut_batch_is_made_again(model, tmp_path, calls):
    out = tmp_path / "x.jsonl"
    run(model, out)
    lines = out.read_bytes().splitlines(keepends=True)
    calls.clear()
    out.write_bytes(b"".join(lines[:4]))
    run(model, out)
    assert len(calls) == 3 and out.read_bytes() == b"".join(lines)
    out.write_bytes(b"".join(lines) + b'{"index": 7, ')
    run(model, out)
    assert len(calls) == 3 and out.read_bytes() == b"".join(lines)


def test_repeated_answers_are_known_after_a_kill(model, tmp_path):
    """What was kept before counts, too."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "x.jsonl"
    options = dict(instructions=["what is rent", "why"] * 3, temperature=0)
    assert len(run(model, whole, **options)) < 3
    with pytest.raises(toy.Killed):
        run(model, out, **options, after=toy.kill_after(2))
    run(model, out, **options)
    assert out.read_bytes() == whole.read_bytes()


def other_weights(model):
    model.model.layers[1].mlp.down_proj.weight.data[:, ::3] += 1
    return {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, "it has model"),
        (lambda _: {"tokenizer": toy.tokenizer(toy.DROPS)}, "it has tokenizer"),
        (lambda _: {"instructions": toy.INSTRUCTIONS[::-1]}, "it has instructions"),
        (lambda _: {"instructions": toy.INSTRUCTIONS[:5]}, "count 7, not 5"),
        (lambda _: {"temperature": 0.8}, "temperature 0.7, not 0.8"),
        (lambda _: {"top_p": 1.0}, "top_p 0.95, not 1.0"),
        (lambda _: {"max_new_tokens": 13}, "max_new_tokens 12, not 13"),
        (lambda _: {"prompt": None}, "prompt 'you are a helpful model', not None"),
        (lambda _: {"batch_size": 3}, "batch_size 2, not 3"),
        (lambda _: {"seed": 1}, "seed 0, not 1"),
    ],
)
def test_another_runs_file_is_refused(model, tmp_path, change, message):
    out = tmp_path / "x.jsonl"
    with pytest.raises(toy.Killed):
        run(model, out, after=toy.kill_after(2))
    before = out.read_bytes()
    with pytest.raises(RegaError) as error:
        run(model, out, **change(model))
    assert "another run's" in str(error.value) and message in str(error.value) and str(out) in str(error.value)
    assert out.read_bytes() == before


def in_line(number, old, new):
    def damage(data):
        lines = data.splitlines(keepends=True)
        assert old in lines[number - 1]
        lines[number - 1] = lines[number - 1].replace(old, new)
        return b"".join(lines)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (in_line(4, b"}", b""), "damaged in line 4"),
        (in_line(4, b"{", b"\xff"), "damaged in line 4"),
        (in_line(4, b": ", b":"), "damaged in line 4"),
        (in_line(4, b'"index": 2', b'"index": 3'), "damaged in line 4"),
        (in_line(4, b'"dropped": null', b'"dropped": "odd"'), "damaged in line 4"),
        (in_line(4, b'"finished": true', b'"finished": 1'), "damaged in line 4"),
        (in_line(4, b'"tokens"', b'"token"'), "damaged in line 4"),
        (lambda data: b"".join(line for line in data.splitlines(True) if b'"index": 2' not in line), "in line 4"),
        (lambda data: data + data.splitlines(True)[-1], "damaged in line 9"),
        (lambda data: b"[1]\n" + data, "damaged in line 1"),
        (in_line(1, b"distilled 1", b"distilled 2"), "no file of distilled answers of this version"),
        (lambda data: b'{"a": 1}\n', "no file of distilled answers"),
        (lambda data: b"some text", "no file of distilled answers"),
    ],
)
def test_a_damaged_file_is_refused(model, tmp_path, damage, message):
    out = tmp_path / "x.jsonl"
    run(model, out)
    out.write_bytes(damage(out.read_bytes()))
    before = out.read_bytes()
    for use in (read_distilled, lambda out: run(model, out)):
        with pytest.raises(RegaError) as error:
            use(out)
        assert message in str(error.value) and str(out) in str(error.value)
    assert out.read_bytes() == before


@pytest.mark.parametrize("damage", [in_line(4, b"water", b"wader"), in_line(4, b'"seed": ', b'"seed": 1')])
def test_a_file_of_other_instructions_or_seeds_is_refused(model, tmp_path, damage):
    out = tmp_path / "x.jsonl"
    run(model, out)
    out.write_bytes(damage(out.read_bytes()))
    before = out.read_bytes()
    with pytest.raises(RegaError, match="damaged in line 4"):
        run(model, out)
    assert out.read_bytes() == before


def test_files_to_read(model, tmp_path):
    with pytest.raises(RegaError, match="does not exist"):
        read_distilled(tmp_path / "x.jsonl")
    run(model, tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="read it with read_distilled"):
        read_pairs(tmp_path / "x.jsonl")


LOOP = "one two three four five six seven eight "


@pytest.mark.parametrize(
    ("answers", "reasons"),
    [
        (["red", "  ", "", "\n"], [None, "empty", "empty", "empty"]),
        (["Red sun", "red", "red\n SUN", "blue"], [None, None, "repeated", None]),
        ([LOOP * 3, LOOP * 2, LOOP * 3], ["repeated", None, "repeated"]),
        (["yes " * 10, "yes " * 9], ["repeated", None]),
        ([LOOP + "x " + LOOP.upper() + "y " + LOOP], ["repeated"]),
        ([LOOP.replace("eight", "a") + LOOP.replace("eight", "b") + LOOP.replace("eight", "c")], [None]),
    ],
)
def test_what_is_left_out(model, tmp_path, monkeypatch, answers, reasons):
    tokenizer, answered = toy.tokenizer(), iter(answers)
    monkeypatch.setattr(tokenizer, "decode", lambda *_, **__: next(answered))
    asked = toy.INSTRUCTIONS[: len(answers)]
    pairs = run(model, tmp_path / "x.jsonl", tokenizer=tokenizer, instructions=asked)
    records = read_records(tmp_path / "x.jsonl")
    assert [record["dropped"] for record in records] == reasons
    assert pairs == [Pair(i, a.strip()) for i, a, r in zip(asked, answers, reasons, strict=True) if r is None]
    assert [record["answer"] for record in records] == [answer.strip() for answer in answers]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instructions": []}, "instructions must be a sequence of at least one string"),
        ({"instructions": "what"}, "instructions must be a sequence of at least one string"),
        ({"instructions": ["what", ""]}, "instruction 1 must be a string with text in it"),
        ({"instructions": ["what", 5]}, "instruction 1 must be a string with text in it, got 5"),
        ({"prompt": " "}, "prompt must be a string with text"),
        ({"temperature": -0.1}, "temperature must be a number that is 0 or above, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size must be a whole number of at least 1, got 2.0"),
        ({"batch_size": True}, "batch_size must be a whole number of at least 1, got True"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"tokenizer": toy.tokenizer(None)}, "no chat template"),
    ],
)
def test_bad_arguments(model, tmp_path, changes, message):
    with pytest.raises(ValueError) as error:
        run(model, tmp_path / "x.jsonl", **changes)
    assert message in str(error.value) and not list(tmp_path.iterdir())


def test_an_answer_needs_an_end(model, tmp_path):
    tokenizer = toy.tokenizer()
    tokenizer.eos_token, model.generation_config.eos_token_id = None, None
    with pytest.raises(ValueError, match="no answer would end"):
        run(model, tmp_path / "x.jsonl", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_any_of_several_ends(model, tmp_path):
    """Ends of the generation config count beside the tokenizer's own."""
    model.generation_config.eos_token_id = list(range(7, len(toy.tokenizer())))
    run(model, tmp_path / "x.jsonl")
    records = read_records(tmp_path / "x.jsonl")
    assert {(record["tokens"], record["finished"]) for record in records} <= {(n, True) for n in range(1, 9)}


def test_texts_stay_as_they_are(model, tmp_path):
    """Line separators and letters beyond ASCII stand in the file as themselves, and are no ends of lines."""
    asked = ["é\u2028中", "a\nb\x85"]
    run(model, tmp_path / "x.jsonl", instructions=asked)
    assert "é\u2028中".encode() in (tmp_path / "x.jsonl").read_bytes()
    assert [record["instruction"] for record in read_records(tmp_path / "x.jsonl")] == asked
    header = json.loads((tmp_path / "x.jsonl").read_bytes().split(b"\n")[0])
    assert header["format"] == "gci_kernels.rega.distilled 1" and header["count"] == 2
