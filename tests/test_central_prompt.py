"""The central prompt computed once: answers are those without it, alone and in batches; what is stale is refused."""

import copy

import pytest
import torch
import toy_rega as toy
import toy_training
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

import gci_kernels
from gci_kernels.rega import RegaError, Roles, central_prompt_cache, distill, messages, supports_system

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = ("plain", *toy_training.METHODS)
ASKED = ["what is rent", "name three colours and the sun is cold", "why", "what does the tenant owe the court"]
GREEDY = dict(do_sample=False, max_new_tokens=10, output_logits=True, return_dict_in_generate=True)


def build(method: str, seed: int = 1):
    model = toy.llama()
    if method != "plain":
        torch.manual_seed(seed)
        model = gci_kernels.patch(model, toy_training.CONFIGS[method](0.0)).double().eval()
    model.generation_config.eos_token_id = None  # so that every answer has the full length
    return model


def without(model, tokenizer, instructions: list[str], **options) -> tuple[Tensor, Tensor]:
    """The new tokens and their logits, prompts padded on the left."""
    system = supports_system(tokenizer)
    turns = [messages(toy.ROLES.central, text, system=system) for text in instructions]
    texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    return taken(model, {name: batch[name] for name in ("input_ids", "attention_mask")} | options)


def taken(model, request: dict) -> tuple[Tensor, Tensor]:
    made = model.generate(**request, **GREEDY)
    return made.sequences[:, request["input_ids"].shape[1] :], torch.stack(made.logits, 1)


@pytest.mark.parametrize("template", ["system", "drops"])
@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_without_it(method, template):
    model, tokenizer = build(method), toy.tokenizer(toy.TEMPLATES[template])
    central = central_prompt_cache(model, tokenizer, toy.ROLES)
    words = " ".join(tokenizer.convert_ids_to_tokens(central.prefix))
    expected = f"<system> {central.prompt} <eos> <user>" if template == "system" else f"<user> {central.prompt}"
    assert words == expected
    for instructions in (*([text] for text in ASKED), ASKED, ASKED[:1] * 3, ASKED[1:3]):
        request = central.request(instructions)
        assert request["past_key_values"].get_seq_length() == len(central.prefix)
        tokens, logits = taken(model, request)
        own_tokens, own_logits = without(model, tokenizer, instructions)
        assert torch.equal(tokens, own_tokens)
        assert (logits - own_logits).abs().max() < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_the_prefix_is_not_run_again(method):
    model, tokenizer = build(method), toy.tokenizer()
    central = central_prompt_cache(model, tokenizer, toy.ROLES)
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    request = central.request(ASKED)
    taken(model, request)
    hook.remove()
    assert seen[0] == request["input_ids"].shape[1] - len(central.prefix) and set(seen[1:]) == {1}


@pytest.mark.smoke
def test_a_string_is_a_batch_of_one():
    model, tokenizer = build("alora"), toy.tokenizer()
    central = central_prompt_cache(model, tokenizer, toy.ROLES)
    one, same = central.request("why"), central.request(["why"])
    assert torch.equal(one["input_ids"], same["input_ids"]) and one["attention_mask"].all()
    assert one["input_ids"][0, : len(central.prefix)].tolist() == central.prefix
    assert torch.equal(taken(model, one)[0], taken(model, same)[0])


def test_padding_is_behind_the_prefix_and_masked():
    tokenizer = toy.tokenizer()
    central = central_prompt_cache(build("plain"), tokenizer, toy.ROLES)
    request, length = central.request(["why does water boil", "why"]), len(central.prefix)
    assert request["attention_mask"].tolist() == [[1] * (length + 6), [1] * length + [0] * 3 + [1] * 3]
    assert request["input_ids"][1, length : length + 3].tolist() == [tokenizer.pad_token_id] * 3
    assert request["input_ids"][:, :length].tolist() == [central.prefix] * 2


@pytest.mark.parametrize("method", ["plain", "alora"])
@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({"num_beams": 3}, 3),
        ({"do_sample": True}, 1),
        ({"do_sample": True, "num_return_sequences": 2}, 2),
        ({"num_beams": 3, "num_return_sequences": 2}, 3),
    ],
)
def test_other_ways_to_generate(method, options, copies):
    model, tokenizer = build(method), toy.tokenizer()
    central = central_prompt_cache(model, tokenizer, toy.ROLES)

    def generate(request):
        torch.manual_seed(3)
        options_ = {"do_sample": False, "max_new_tokens": 8} | options
        return model.generate(**request, **options_)[:, request["input_ids"].shape[1] :]

    batch = central.request(ASKED, copies=copies)
    whole = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(generate(batch), generate(whole))


def test_requests_share_nothing():
    """What one request's generation writes, no other one sees; the kept cache stays as it is."""
    model, tokenizer = build("alora"), toy.tokenizer()
    central = central_prompt_cache(model, tokenizer, toy.ROLES)
    first, second = central.request(ASKED[0]), central.request(ASKED[0])
    expected = taken(model, first)
    for layer in first["past_key_values"].layers:
        layer.keys.fill_(torch.nan)
    found = taken(model, second)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(taken(model, central.request(ASKED[0]))[1], expected[1])


def bump(model):
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name).mul_(2)


def replace(model):
    """By a parameter that was written to as often."""
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    new = torch.nn.Parameter(layer.weight.detach().clone())
    with torch.no_grad():
        while new._version < layer.weight._version:
            new.add_(0.1)
    assert new._version == layer.weight._version
    layer.weight = new


def train_a_step(model):
    model.train()
    model(input_ids=torch.tensor([[7, 8, 9]]), labels=torch.tensor([[7, 8, 9]])).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.eval()


def load(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()))


def scale(model):
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bump, "parameters have changed"),
        (replace, "parameters have changed"),
        (train_a_step, "parameters have changed"),
        (load, "parameters have changed"),
        (lambda model: model.float(), "parameters have changed"),
        (scale, "other adapters are active, or with other weight"),
        (lambda model: model.base_model.disable_adapter_layers(), "other adapters are active"),
        (lambda model: model.merge_adapter(), "other adapters are active"),
        (lambda model: model.set_adapter("second"), "other adapters are active"),
        (lambda model: model.train(), "in training mode"),
    ],
)
def test_a_stale_cache_is_refused(change, message):
    config = toy_training.CONFIGS["lora"](0.0)
    model = get_peft_model(toy.llama(), config).double().eval()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.double().eval()
    central = central_prompt_cache(model, toy.tokenizer(), toy.ROLES)
    central.request("why")
    change(model)
    with pytest.raises(RegaError, match=message):
        central.request("why")


@pytest.mark.parametrize("method", METHODS)
def test_generating_makes_nothing_stale(method):
    model, tokenizer = build(method), toy.tokenizer()
    central = central_prompt_cache(model, tokenizer, toy.ROLES)
    for _ in range(2):
        taken(model, central.request(ASKED))
    if method != "plain":
        with model.disable_adapter():
            with pytest.raises(RegaError, match="other adapters are active"):
                central.request("why")
    central.request("why")


def test_it_is_made_in_evaluation_mode():
    with pytest.raises(RegaError, match="in training mode.*call model.eval()"):
        central_prompt_cache(build("plain").train(), toy.tokenizer(), toy.ROLES)


def test_instructions_that_dont_fit():
    model = build("plain")
    central = central_prompt_cache(model, toy.tokenizer(), toy.ROLES)
    for bad, message in (([], "at least one"), (["why", ""], "instruction 1 must be a string with text")):
        with pytest.raises(ValueError, match=message):
            central.request(bad)
    with pytest.raises(ValueError, match="copies must be at least 1, got 0"):
        central.request("why", copies=0)
    picky = "{% if 'fever' in messages[-1]['content'] %}<bos> {% endif %}" + toy.SYSTEM
    central = central_prompt_cache(model, toy.tokenizer(picky), toy.ROLES)
    with pytest.raises(ValueError, match="instruction 1 doesn't continue the central prompt's 8 tokens"):
        central.request(["why", "fever"])


def test_templates_without_a_common_token():
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="nothing in front of the instruction"):
        central_prompt_cache(build("plain"), toy.tokenizer("{{ messages[-1]['content'] }} " + template), toy.ROLES)
    with pytest.raises(ValueError, match="no chat template"):
        central_prompt_cache(build("plain"), toy.tokenizer(None), toy.ROLES)


def test_a_word_that_takes_in_the_prompts_end_is_not_kept():
    """Without a space the prompt's last word and the instruction are one; so it is no part of the prefix."""
    glued = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
    tokenizer = toy.tokenizer(glued)
    central = central_prompt_cache(build("plain"), tokenizer, toy.ROLES)
    assert tokenizer.convert_ids_to_tokens(central.prefix) == ["you", "are", "a", "helpful"]


def test_line_breaks_that_run_together_are_not_kept():
    """An instruction's first one may become a token with those in front of it."""
    tokenizer = toy.tokenizer(toy.DROPS)
    tokenizer.add_tokens(["\n\n", "\n\n\n"])
    model = build("plain")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    central = central_prompt_cache(model, tokenizer, toy.ROLES)
    assert tokenizer.convert_ids_to_tokens(central.prefix) == ["<user>", *toy.ROLES.central.split()]
    for text in ("why", "\nwhy"):
        assert torch.equal(taken(model, central.request(text))[0], without(model, tokenizer, [text])[0])


def sliding():
    torch.manual_seed(0)
    config = MistralConfig(**{**toy.llama().config.to_dict(), "sliding_window": 5, "model_type": "mistral"})
    return MistralForCausalLM(config).double().eval()


def bloom():
    torch.manual_seed(0)
    size = dict(hidden_size=32, n_layer=2, n_head=2, initializer_range=0.2, bos_token_id=1, eos_token_id=2)
    return BloomForCausalLM(BloomConfig(vocab_size=len(toy.tokenizer()), **size)).double().eval()


@pytest.mark.parametrize(("make", "why"), [(sliding, "sliding windows"), (bloom, "takes no position_ids")])
def test_models_that_would_count_padding_take_equal_lengths(make, why):
    model, tokenizer = make(), toy.tokenizer()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    central = central_prompt_cache(model, tokenizer, toy.ROLES)
    for instructions in (ASKED[:1], ASKED[1:2], [ASKED[0], "what is fever"]):
        tokens, logits = taken(model, central.request(instructions))
        own_tokens, own_logits = without(model, tokenizer, instructions)
        assert torch.equal(tokens, own_tokens) and (logits - own_logits).abs().max() < 1e-5
    with pytest.raises(ValueError, match=f"can't be one batch for this model: it (has|takes).*{why.split()[-1]}"):
        central.request(ASKED)


def test_a_model_that_keeps_nothing_is_refused(monkeypatch):
    model = build("plain")
    own = model.forward
    monkeypatch.setattr(model, "forward", lambda **given: own(**given | {"use_cache": False}))
    with pytest.raises(ValueError, match="prompt can't be kept"):
        central_prompt_cache(model, toy.tokenizer(), toy.ROLES)


def test_it_answers_as_the_distilled_model_did():
    """Under the same prompt; the other roles' play no part."""
    model, tokenizer = build("plain"), toy.tokenizer()
    assert central_prompt_cache(model, tokenizer, Roles(toy.ROLES.central, {"x": "y"})).prefix == (
        central_prompt_cache(model, tokenizer, toy.ROLES).prefix
    )
    greedy = dict(prompt=toy.ROLES.central, temperature=0, max_new_tokens=10, progress=False)
    pairs, central = distill(model, tokenizer, ASKED, **greedy), central_prompt_cache(model, tokenizer, toy.ROLES)
    assert pairs
    for pair in pairs:
        row = taken(model, central.request(pair.instruction))[0][0].tolist()
        answer = row[: row.index(2)] if 2 in row else row
        assert pair.answer == tokenizer.decode(answer, skip_special_tokens=True)
