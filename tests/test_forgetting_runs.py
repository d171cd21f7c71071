"""`python -m bench.forgetting` from beginning to end, on a tiny model and made-up licences; killed and gone on with."""

import importlib
import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file
from toy_licences import TEXTS
from toy_rega import INSTRUCTIONS, WORDS, llama, tokenizer

import gci_kernels
from gci_kernels import native, rega
from gci_kernels.bench import machine
from gci_kernels.bench.forgetting import __main__ as command
from gci_kernels.bench.forgetting import evaluate, general, materials, rates, report, runs, sources
from gci_kernels.bench.forgetting.__main__ import Comparison
from gci_kernels.bench.forgetting.batches import Example
from gci_kernels.bench.forgetting.general import Choice
from gci_kernels.bench.forgetting.materials import Materials, Sizes
from gci_kernels.bench.forgetting.methods import METHODS
from gci_kernels.bench.forgetting.training import Schedule
from gci_kernels.rega.distilled import read_records

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = Sizes(
    train=12, held_out=6, loss_tasks=3, texts=3, own=1, replayed=3, new_tokens=16, arithmetic=4, glosses=3, attributed=2
)
TINY = Comparison(SIZES, Schedule(batch=3, every=2, steps=4, target=0.5), seeds=(0, 1))
CHOICES = [Choice(f"what is {word}", ("rent", "the sun", "cold", "a court"), 1) for word in ("rest", "fever", "water")]


@pytest.fixture
def texts(monkeypatch):
    """Texts and words that the toy tokenizer knows, and the toy model, in place of the real ones."""
    monkeypatch.setattr(sources, "licences", lambda log: TEXTS)
    monkeypatch.setattr(general, "instructions", lambda count, seed: INSTRUCTIONS)
    monkeypatch.setattr(
        general, "held_out_texts", lambda count, seed: [" ".join(WORDS[n : n + 7]) for n in range(count)]
    )
    monkeypatch.setattr(general, "gloss_choices", lambda count, seed: CHOICES[:count])
    monkeypatch.setattr(materials, "CENTRAL", "you are a helpful model")
    monkeypatch.setattr(materials, "ROLES", rega.Roles("you are a helpful model", {"law": "you are a lawyer"}))
    monkeypatch.setattr(command, "load_tokenizer", lambda name: tokenizer())
    monkeypatch.setattr(command, "load_model", lambda name, dtype, device, log: (llama().to(dtype), tokenizer()))


@pytest.fixture
def made(texts, tmp_path):
    found = Materials(tmp_path, tokenizer(), SIZES, print)
    found.prepare(lambda dtype: llama().to(dtype))
    return found


@pytest.fixture
def evaluator(made):
    return evaluate.Evaluator(llama(), tokenizer(), made.held_out(), made.chat)


def test_the_untouched_model_is_no_way_from_itself(evaluator):
    point = evaluator.point(llama(), 3, 40)
    assert point.kl_texts == point.kl_own == 0 and (point.step, point.tokens) == (3, 40)
    changed = llama()
    torch.nn.init.normal_(changed.lm_head.weight, std=0.3)
    point = evaluator.point(changed, 0, 0)
    assert point.kl_texts > 0.1 and point.kl_own > 0.1 and point.kl_texts != point.kl_own


def test_losses_are_those_of_every_text(evaluator, made):
    """All texts together, each by itself, against transformers' own loss."""
    held_out, model = made.held_out(), llama()

    def mean(examples):
        losses = []
        for example in examples:
            labels = torch.tensor([example.labels])
            count = int((labels[:, 1:] != -100).sum())
            losses += [model(torch.tensor([example.ids]), labels=labels).loss.item()] * count
        return sum(losses) / len(losses)

    point = evaluator.point(model, 0, 0)
    assert point.domain_loss == pytest.approx(mean(held_out.loss_tasks), abs=1e-5)
    assert point.general_loss == pytest.approx(mean(held_out.texts), abs=1e-5)
    groups = [task.group for task in held_out.domain]
    assert len(held_out.loss_tasks) == 3 and sorted(set(groups)) == ["permission", "summary", "term"]


def test_answers_come_in_the_order_of_their_prompts(evaluator, made):
    """Batches are by length; one prompt alone gives the same answer, without the prompt."""
    prompts, words = [*INSTRUCTIONS, "what is a court what is rent"], tokenizer()
    alone = []
    for prompt in prompts:
        ids = torch.tensor([evaluator.chat(prompt)])
        made = llama().generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        alone.append(words.decode(made, skip_special_tokens=True))
    assert evaluator.generate(llama(), prompts, 6) == alone and any(alone)


@pytest.mark.parametrize("method", ["plain", "alora"])
def test_options_are_as_likely_as_alone(evaluator, method):
    """Each option's mean log-probability from a forward of its own; the prompts' lengths differ, as the options' do."""
    model, words = llama(), tokenizer()
    if method == "alora":
        model = gci_kernels.patch(model, gci_kernels.ALoRAConfig(r=4, num_heads=2, init_weights=False)).double().eval()
    choices = [replace(CHOICES[0], prompt="what does the tenant owe the court"), *CHOICES[1:]]
    means = []
    for choice in choices:
        prompt = evaluator.chat(choice.prompt)
        for option in choice.options:
            ids = words(option, add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            means.append(logits.gather(1, torch.tensor(ids)[:, None]).mean())
    prompts = [Example(tuple(ids), (0,) * len(ids)) for ids in (evaluator.chat(choice.prompt) for choice in choices)]
    options = [option for choice in choices for option in choice.options]
    with torch.inference_mode():
        found = evaluator._likelihood(model, prompts, options)
    torch.testing.assert_close(found, torch.stack(means).float(), rtol=0, atol=1e-5)
    picks = torch.stack(means).view(3, 4).argmax(1).tolist()
    for right in range(4):
        share = sum(pick == right for pick in picks) / len(picks)
        asked = [replace(choice, right=right) for choice in choices]
        assert evaluator.choose(model, asked) == pytest.approx(share)


@pytest.mark.parametrize("known", ["term", "summary", "permission"])
def test_answers_are_judged_by_group(evaluator, monkeypatch, known):
    """A model that knows the answers of one group's tasks and is silent about all others."""
    tasks = evaluator.held_out.domain
    written = [task.answer if task.group == known else "" for task in tasks]
    monkeypatch.setattr(evaluator, "generate", lambda model, prompts, count: written)
    answers = evaluator.answers(llama())
    assert {group: answers[group] for group in ("term", "summary", "permission")} == {
        group: float(group == known) for group in ("term", "summary", "permission")
    }
    assert set(answers) == set(report.ANSWERS)


def test_full_fine_tuning_is_used_in_bfloat16():
    """Of a copy: training goes on in float32."""
    model = llama().float()
    used = runs._as_used(model, METHODS["full"])
    assert used.dtype == torch.bfloat16 and model.dtype == torch.float32
    assert runs._as_used(model, METHODS["lora"]) is model


def test_rega_trains_on_a_mixture_of_known_counts(made):
    plain, none = made.examples(0, with_rega=False)
    mixed, counts = made.examples(0, with_rega=True)
    assert none is None and len(plain) == 12
    replayed = len(made.replayed)
    assert counts == {"general": replayed, "domain": 12, "integrated": 1} and len(mixed) == replayed + 13
    role, central = (tuple(tokenizer()(f"<system> {text} <eos>")["input_ids"]) for text in (
        "you are a lawyer", "you are a helpful model"))  # fmt: skip
    assert sum(example.ids[: len(role)] == role for example in mixed) == 12
    assert sum(example.ids[: len(central)] == central for example in mixed) == replayed + 1
    assert all(example.ids[: len(central)] == central for example in plain)


def test_answers_that_were_cut_off_are_not_replayed(made):
    records = read_records(made.folder / "distilled.jsonl")
    whole = [r["instruction"] for r in records if r["finished"] and r["dropped"] is None]
    assert made.replayed and [pair.instruction for pair in made.replayed] == whole[-len(made.replayed) :]
    assert len(whole) < sum(r["dropped"] is None for r in records)


def test_materials_are_made_once(made, monkeypatch):
    before = {path.name: path.read_bytes() for path in made.folder.iterdir()}
    monkeypatch.setattr(importlib.import_module("gci_kernels.rega.distill"), "_answers", lambda *_: 1 / 0)
    again = Materials(made.folder, tokenizer(), SIZES, print)
    again.prepare(lambda dtype: llama().to(dtype))
    assert (again.own, again.replayed) == (made.own, made.replayed)
    assert {path.name: path.read_bytes() for path in made.folder.iterdir()} == before
    assert load_file(made.scores)["scores"].shape == (2, 2, 32)


def test_own_answers_that_are_too_few_are_an_error(texts, tmp_path):
    few = Materials(tmp_path, tokenizer(), replace(SIZES, own=3, replayed=3), print)
    with pytest.raises(RuntimeError, match=r"only \d of 7 own answers are usable, 6 are needed"):
        few.prepare(lambda dtype: llama().to(dtype))


def run(tmp_path, *more):
    assert (
        command.main(["--quick", "--folder", str(tmp_path / "kept"), "--out", str(tmp_path), "--threads", "1", *more])
        == 0
    )
    return json.loads((tmp_path / "forgetting.json").read_text())


def test_the_command_compares_all_methods(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "QUICK", TINY)
    seeds = {"adapters": [], "examples": []}
    adapt, examples = runs.adapt, Materials.examples

    def adapting(model, method, scores, seed):
        seeds["adapters"].append(seed)
        return adapt(model, method, scores, seed)

    def drawing(self, seed, with_rega):
        seeds["examples"].append(seed)
        return examples(self, seed, with_rega)

    monkeypatch.setattr(runs, "adapt", adapting)
    monkeypatch.setattr(Materials, "examples", drawing)
    result = run(tmp_path)
    assert seeds["adapters"] == seeds["examples"] == [made["seed"] for made in result["runs"]]
    full, lora = result["runs"][:2]
    # A and B of rank 32 on three projections of two layers, in float32; AdamW keeps two numbers for each.
    assert lora["trainable"] == 2 * 3 * 32 * (32 + 48) and lora["memory"]["optimizer"] == 8 * lora["trainable"]
    assert full["trainable"] == llama().num_parameters()
    assert [(r["method"], r["seed"]) for r in result["runs"]] == [
        *((name, seed) for seed in (0, 1) for name in METHODS), ("loramoe_eager", 0),
    ]  # fmt: skip
    for made in result["runs"]:
        assert [point["step"] for point in made["points"]] == [0, 2, 4] and len(made["losses"]) == 4
        assert made["points"][0] == result["untouched"]["points"][0]
        assert (made["gates"] is not None) == (made["method"] in ("loramoe", "loramoe_balance"))
        assert (made["mixture"] is not None) == (made["method"] == "lora_rega")
    assert not list((tmp_path / "kept" / "runs").glob("*.partial"))
    text = (tmp_path / "forgetting.md").read_text()
    assert all(method.title in text for method in METHODS.values())
    assert (tmp_path / "forgetting.png").stat().st_size > 20_000


def test_a_killed_command_goes_on(texts, tmp_path, monkeypatch):
    """Finished runs are found; the one that was cut goes on where it was looked at last."""
    monkeypatch.setattr(command, "QUICK", replace(TINY, seeds=(0,)))
    unbroken = run(tmp_path / "unbroken", "--methods", "lora", "loki_10")
    look, looks = evaluate.Evaluator.point, []

    def killing(self, model, step, tokens):
        looks.append(step)
        if len(looks) == 5:  # the untouched model, LoRA twice, LoKI once
            raise KeyboardInterrupt
        return look(self, model, step, tokens)

    monkeypatch.setattr(evaluate.Evaluator, "point", killing)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", "--methods", "lora", "loki_10")
    assert looks == [0, 2, 4, 2, 4]
    went_on = run(tmp_path / "killed", "--methods", "lora", "loki_10")
    assert looks[5:] == [4]
    for mine, other in zip(went_on["runs"], unbroken["runs"], strict=True):
        assert (mine["points"], mine["losses"], mine["answers"]) == (other["points"], other["losses"], other["answers"])


def test_the_command_searches_rates(texts, tmp_path, monkeypatch, capsys):
    """Downwards from the method's own rate while the target is reached; the table shows what was tried, once."""
    monkeypatch.setattr(command, "QUICK", replace(TINY, seeds=(0,)))
    monkeypatch.setattr(runs, "matched", lambda points, target: asdict(points[-1]))
    monkeypatch.setattr(rates, "GRID", (5e-5, METHODS["lora"].learning_rate, 0.1))
    arguments = ["--quick", "--folder", str(tmp_path), "--threads", "1", "--methods", "lora", "lora_rega"]
    assert command.main([*arguments, "--search"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in table[2:]] == [["| LoRA r=32", "5e-05"], ["| LoRA r=32", "0.0002"]]
    assert all(rates.SEED == json.loads(path.read_text())["seed"] for path in (tmp_path / "runs").glob("lora-*"))
    monkeypatch.setattr(runs.Runs, "_result", lambda *_: 1 / 0)
    assert command.main([*arguments, "--search"]) == 0


def test_without_the_compiled_kernels_nothing_is_timed(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(native, "_extension", None)
    assert command.main(["--quick", "--folder", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "_native could not be loaded" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_other_settings_are_kept_elsewhere():
    names = {TINY.name(), replace(TINY, seeds=(0,)).name(), replace(TINY, sizes=replace(SIZES, own=3)).name()}
    assert len(names) == 3 and TINY.name() == replace(TINY).name()


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(TypeError):
        machine.write_json(tmp_path / "a.json", {"a": object()})
    assert not list(tmp_path.iterdir())
