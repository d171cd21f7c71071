"""The real model: same greedy tokens, same training, a tenth of the memory. Fetches SmolLM2-135M-Instruct once."""

import copy

import pytest
import torch

import gci_kernels
from gci_kernels.accuracy import relative_error
from gci_kernels.bench.models import load_model
from gci_kernels.bench.timing import saved_bytes
from gci_kernels.bench.variants import generate, make_prompt, model_variants, random_ids, training_loss
from gci_kernels.tuners import shared_input

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["loramoe", "lora", "alora", "loki"])
def smollm2(request):
    model, tokenizer = load_model("smollm2", torch.float32, CPU)
    return request.param, model_variants(model, request.param), tokenizer


def test_same_greedy_tokens_as_eager(smollm2):
    _, variants, tokenizer = smollm2
    prompt = make_prompt(variants["frozen"], tokenizer)
    eager, fused = (generate(variants[name].eval(), prompt, 48) for name in ("eager", "gci"))
    assert tokenizer.decode(fused) == tokenizer.decode(eager)


@pytest.mark.parametrize("batch", (1, 8))
def test_decoding_in_bfloat16_is_as_near_to_the_truth_as_eagers(smollm2, batch):
    """Token by token along eager's own answer. Its logits lie 1/8 apart: at ties, which are common, both may part."""
    _, variants, tokenizer = smollm2
    models = {name: copy.deepcopy(variants[name]).bfloat16().eval() for name in ("eager", "gci")}
    prompt = {name: t.expand(batch, -1) for name, t in make_prompt(models["eager"], tokenizer).items()}
    options = dict(do_sample=False, max_new_tokens=32, min_new_tokens=32, output_logits=True)
    eager = models["eager"].generate(**prompt, **options, return_dict_in_generate=True)
    start = prompt["input_ids"].shape[1]
    logits, answers = torch.stack(eager.logits, 1), eager.sequences[:, start:]
    made, cache = [], None
    with torch.no_grad():
        for ids in (prompt["input_ids"], *answers[:, :-1].split(1, 1)):
            output = models["gci"](ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            made.append(output.logits[:, -1])
        # The adapters as they are in bfloat16, and nothing else rounded.
        truth = models["eager"].double()(eager.sequences).logits[:, start - 1 : -1]
    made = torch.stack(made, 1)
    assert relative_error(made, truth) <= 2 * relative_error(logits, truth)
    assert (made.argmax(-1) == answers).float().mean() > 0.9


def losses_of(model, ids):
    """Of five steps of training a copy of `model`."""
    model = copy.deepcopy(model).train()  # the variants of LoRA share their adapters
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = training_loss(model, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_same_losses_while_training(smollm2):
    _, variants, _ = smollm2
    ids = random_ids(variants["frozen"], 2, 64)
    eager, fused = (losses_of(variants[name], ids) for name in ("eager", "gci"))
    assert fused[-1] < fused[0]
    assert torch.allclose(eager, fused, rtol=1e-3)


def test_layers_that_share_their_input_train_as_separate_ones(smollm2, monkeypatch):
    _, variants, _ = smollm2
    ids = random_ids(variants["frozen"], 2, 64)
    together = losses_of(variants["gci"], ids)
    monkeypatch.setattr(shared_input, "_takes", lambda arguments, x: False)
    assert torch.allclose(losses_of(variants["gci"], ids), together, rtol=1e-4)


def test_adapters_keep_a_tenth_of_eagers_bytes(smollm2):
    method, variants, _ = smollm2
    ids = random_ids(variants["frozen"], 2, 64)
    saved = {name: saved_bytes(lambda m=m: training_loss(m.train(), ids), m) for name, m in variants.items()}
    ratio = (saved["gci"] - saved["frozen"]) / (saved["eager"] - saved["frozen"])
    assert ratio <= (0.1 if method == "loramoe" else 1.0)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True},
    "assisted": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("mode", MODES)
def test_alora_generates_with_its_cache_what_it_would_without(mode):
    """Prompts of unequal length, padded on the left; assisted decoding takes one alone."""
    model, tokenizer = load_model("smollm2", torch.float32, CPU)
    torch.manual_seed(0)
    model = gci_kernels.patch(model, gci_kernels.ALoRAConfig(r=16, num_heads=4, init_weights=False)).eval()
    for name, parameter in model.named_parameters():
        if "gci_alora_B" in name:
            parameter.data.mul_(0.3)  # the answers stay words, but others
    prompts = ["The licence allows you to", "A court that finds the clause void shall", "Name three colours:"]
    prompts = prompts[:1] if mode == "assisted" else prompts
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=True)

    def generate(**options):
        torch.manual_seed(1)
        return model.generate(**batch, **({"do_sample": False} | options), max_new_tokens=12, min_new_tokens=12)

    with_cache = generate(**MODES[mode])
    options = {key: value for key, value in MODES[mode].items() if key != "prompt_lookup_num_tokens"}
    assert torch.equal(with_cache, generate(**options, use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(with_cache, generate(**MODES[mode]))
