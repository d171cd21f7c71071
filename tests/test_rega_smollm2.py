"""REGA on the real model: a killed distillation goes on, and the kept central prompt gives the same tokens.

Fetches SmolLM2-135M-Instruct once.
"""

import pytest
import torch
import toy_rega as toy

from gci_kernels import rega
from gci_kernels.bench.models import load_model

pytestmark = pytest.mark.slow
ROLES = rega.Roles("You are a helpful assistant.", {"law": "You are a lawyer."})
ASKED = ["Name three colours.", "Why is the sky blue?", "What is the capital of France?", "\nWrite one line on rain."]


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2", torch.float32, torch.device("cpu"))


def test_a_killed_distillation_goes_on(smollm2, tmp_path):
    model, tokenizer = smollm2
    options = dict(prompt=ROLES.central, max_new_tokens=40, batch_size=2, progress=False)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "x.jsonl"
    pairs = rega.distill(model, tokenizer, ASKED, out=whole, **options)
    assert len(pairs) == 4 and "Paris" in pairs[2].answer
    with pytest.raises(toy.Killed):
        rega.distill(model, tokenizer, ASKED, out=out, after=toy.kill_after(2), **options)
    assert rega.distill(model, tokenizer, ASKED, out=out, **options) == pairs
    assert out.read_bytes() == whole.read_bytes()


def test_labels_are_the_answer_and_its_end(smollm2):
    _, tokenizer = smollm2
    assert rega.supports_system(tokenizer)
    made = rega.encode(tokenizer, rega.messages(ROLES.central, ASKED[2], "Paris."))
    assert tokenizer.decode([label for label in made["labels"] if label != -100]) == "Paris.<|im_end|>\n"


@pytest.mark.parametrize("asked", [ASKED[:1], ASKED[1:2], ASKED], ids=["one", "another", "batch"])
def test_the_kept_central_prompt_gives_the_same_tokens(smollm2, asked):
    model, tokenizer = smollm2
    central = rega.central_prompt_cache(model.eval(), tokenizer, ROLES)
    assert tokenizer.decode(central.prefix) == f"<|im_start|>system\n{ROLES.central}<|im_end|>\n<|im_start|>user\n"
    turns = [rega.messages(ROLES.central, text) for text in asked]
    texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")

    def answers(request):
        made = model.generate(**request, do_sample=False, max_new_tokens=32)
        return made[:, request["input_ids"].shape[1] :].tolist()

    assert answers(central.request(asked)) == answers(whole)
