"""Roles, chats with and without a system turn, labels of an answer alone, and what people's files hold."""

import json

import pytest
import torch
import toy_rega as toy
from transformers import Trainer, TrainingArguments

from gci_kernels.rega import Pair, Roles, encode, messages, read_instructions, read_pairs, supports_system

pytestmark = pytest.mark.usefixtures("one_thread")
CHAT = messages("you are a lawyer", "what is rent", "pay the court")


def words(tokenizer, ids) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def test_roles_of_a_file(tmp_path):
    path = tmp_path / "roles.json"
    path.write_text(json.dumps({"central": toy.ROLES.central, "domains": dict(toy.ROLES.domains)}))
    assert Roles.load(path) == toy.ROLES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", 'must be {"central"'),
        ('{"central": "x"}', 'must be {"central"'),
        ('{"central": "x", "domains": {"law": "y"}, "more": 1}', 'must be {"central"'),
        ('{"central": " ", "domains": {"law": "y"}}', "the central prompt must be a string with text in it, got ' '"),
        ('{"central": 3, "domains": {"law": "y"}}', "the central prompt must be a string"),
        ('{"central": "x", "domains": {}}', "at least one domain's name"),
        ('{"central": "x", "domains": ["law"]}', "at least one domain's name"),
        ('{"central": "x", "domains": {"": "y"}}', "a domain's name must be a string with text"),
        ('{"central": "x", "domains": {"law": null}}', "the role prompt of 'law' must be a string"),
        ('{"central": "x", "domains": {"general": "y"}}', "'general' can't be a special domain"),
        ('{"central": "\\ud800", "domains": {"law": "y"}}', "half of a surrogate pair"),
    ],
)
def test_a_bad_file_of_roles(tmp_path, text, message):
    path = tmp_path / "roles.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        Roles.load(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def test_a_missing_file_of_roles(tmp_path):
    with pytest.raises(FileNotFoundError):
        Roles.load(tmp_path / "roles.json")


def test_messages():
    user, assistant = dict(role="user", content="why"), dict(role="assistant", content="no")
    assert messages(None, "why") == messages(None, "why", system=False) == [user]
    assert messages("you", "why", "no") == [dict(role="system", content="you"), user, assistant]
    assert messages("you", "why", "no", system=False) == [dict(role="user", content="you\n\nwhy"), assistant]


@pytest.mark.parametrize(("template", "expected"), [("system", True), ("drops", False), ("raises", False)])
def test_a_system_turn_is_there_or_not(template, expected):
    assert supports_system(toy.tokenizer(toy.TEMPLATES[template])) is expected


def test_without_a_chat_template():
    for use in (supports_system, lambda tokenizer: encode(tokenizer, CHAT)):
        with pytest.raises(ValueError, match="no chat template.*set tokenizer.chat_template"):
            use(toy.tokenizer(None))


def test_a_template_that_renders_nothing_at_all():
    with pytest.raises(ValueError, match="can't render the turns user: no turns"):
        supports_system(toy.tokenizer("{{ raise_exception('no turns') }}"))


def test_labels_are_the_answer_and_its_end():
    tokenizer = toy.tokenizer()
    made = encode(tokenizer, CHAT)
    prompt = "<system> you are a lawyer <eos> <user> what is rent <eos> <assistant>"
    assert words(tokenizer, made["input_ids"]) == prompt + " pay the court <eos>"
    assert made["labels"] == [-100] * len(prompt.split()) + tokenizer("pay the court <eos>")["input_ids"]


@pytest.mark.parametrize("template", ["drops", "raises"])
def test_without_a_system_turn_the_prompt_is_the_users(template):
    tokenizer = toy.tokenizer(toy.TEMPLATES[template])
    made = encode(tokenizer, messages("you are a lawyer", "what is rent", "no", system=supports_system(tokenizer)))
    assert words(tokenizer, made["input_ids"]) == "<user> you are a lawyer what is rent <eos> <assistant> no <eos>"
    assert [label for label in made["labels"] if label != -100] == tokenizer("no <eos>")["input_ids"]


def test_a_tokenizer_adds_no_special_tokens_of_its_own():
    """The template writes them; a second <bos> would be one that the model never saw."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = toy.tokenizer()
    expected = encode(tokenizer, CHAT)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert tokenizer("no")["input_ids"][0] == 1
    assert encode(tokenizer, CHAT) == expected


def test_only_the_last_answer_is_learned():
    tokenizer = toy.tokenizer()
    made = encode(tokenizer, [*CHAT, *messages(None, "why", "red")])
    assert [label for label in made["labels"] if label != -100] == tokenizer("red <eos>")["input_ids"]


def test_truncation():
    tokenizer = toy.tokenizer()
    whole = encode(tokenizer, CHAT)
    prompt, length = whole["labels"].count(-100), len(whole["labels"])
    assert encode(tokenizer, CHAT, max_length=length) == whole
    cut = encode(tokenizer, CHAT, max_length=prompt + 1)
    assert cut == {name: values[: prompt + 1] for name, values in whole.items()} and cut["labels"][-1] != -100
    with pytest.raises(ValueError, match=f"nothing of the answer is left.*{prompt} tokens, all have {prompt}"):
        encode(tokenizer, CHAT, max_length=prompt)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        encode(tokenizer, CHAT, max_length=0)


@pytest.mark.parametrize("turns", [[], CHAT[:2], CHAT[2:], [*CHAT, CHAT[1]]])
def test_a_chat_without_an_answer(turns):
    with pytest.raises(ValueError, match="must end with an assistant's turn"):
        encode(toy.tokenizer(), turns)


def test_templates_in_which_the_answer_cant_be_found():
    other = toy.SYSTEM.replace("<assistant>{%", "<assistant> yes {%")
    with pytest.raises(ValueError, match="writes the prompt otherwise once an answer follows"):
        encode(toy.tokenizer(other), CHAT)
    glued = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="become one token with the prompt's last"):
        encode(toy.tokenizer(glued), CHAT)


def test_trainer_learns_encoded_examples(tmp_path):
    tokenizer, model = toy.tokenizer(), toy.llama()
    rows = [encode(tokenizer, messages(toy.ROLES.central, "what is rent", text)) for text in ("no", "pay the court")]
    width = max(len(row["labels"]) for row in rows)

    def collate(rows):
        def padded(name, value):
            return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

        mask = padded("labels", -1) != -1
        return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask.long()}

    batch = collate(rows)
    with torch.no_grad():
        scores = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits[:, :-1]
    wanted, targets = batch["labels"][:, 1:] != -100, batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(scores[wanted], targets[wanted]).item()
    assert wanted.sum() == 2 + 4
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows)
    assert trainer.train().training_loss == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate(rows)["eval_loss"] < expected


LINES = [
    '{"instruction": "what is rent", "more": 1}',
    "",
    '{"prompt": "name three colours"}',
    '"why\\u2028does"',
    '{"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "what is fever"}]}',
    "{broken",
    "5",
    '{"text": "x"}',
    '{"instruction": "  "}',
    '{"instruction": ["x"]}',
    '{"messages": [{"role": "assistant", "content": "x"}]}',
    '{"messages": "x"}',
    '{"messages": [{"role": "user"}]}',
    '"\\ud800"',
    "[" * 100_000,
]
PROBLEMS = [
    (6, "not JSON"), (7, "must be a string or an object"), (8, "has no instruction or prompt"),
    (9, "instruction must be a string with text"), (10, "instruction must be a string with text"),
    (11, "messages has no user's turn"), (12, "messages must be a list of objects"),
    (13, "the user's content must be a string"), (14, "half of a surrogate pair"), (15, "nested too deeply"),
]  # fmt: skip


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_instructions_of_json_lines(tmp_path, end):
    path = tmp_path / "x.jsonl"
    path.write_bytes(end.join(LINES).encode() + b"\n" + b'"\xff"\n')
    found, problems = read_instructions(path)
    assert found == ["what is rent", "name three colours", "why\u2028does", "what is fever"]
    for problem, (line, message) in zip(problems, [*PROBLEMS, (16, "not UTF-8")], strict=True):
        assert problem.line == line and message in problem.message


def test_instructions_of_text(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfwhat is rent \n\n  \n{why\x0cdoes}\nno\xff\n")
    found, problems = read_instructions(path)
    assert found == ["what is rent", "{why\x0cdoes}"] and problems == [(5, "not UTF-8")]


def test_pairs(tmp_path):
    path = tmp_path / "x.jsonl"
    talk = [dict(role="assistant", content="hi"), dict(role="user", content="why"), dict(role="assistant", content="c")]
    lines = [
        dict(instruction="what", answer="a"), dict(prompt="who", completion=" b\n"), dict(prompt="how", response="d"),
        {"messages": talk}, {"messages": talk[:2]}, dict(instruction="what"), dict(instruction="what", answer=" "),
        dict(answer="a"), "what",
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)))
    found, problems = read_pairs(path)
    assert found == [Pair("what", "a"), Pair("who", " b\n"), Pair("how", "d"), Pair("why", "c")]
    messages = [
        "messages has no assistant's turn after the user", "has no answer, completion or response",
        "answer must be a string with text", "has no instruction or prompt", "must be an object",
    ]  # fmt: skip
    assert [problem.line for problem in problems] == [5, 6, 7, 8, 9]
    assert all(message in problem.message for problem, message in zip(problems, messages, strict=True))


@pytest.mark.parametrize("read", [read_instructions, read_pairs])
def test_files_without_a_line_to_use(tmp_path, read):
    path = tmp_path / "x.jsonl"
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="x.jsonl holds no line that can be used$"):
        read(path)
    path.write_text("\n5\n")
    with pytest.raises(ValueError, match="x.jsonl holds no line that can be used; line 2: must be a"):
        read(path)
