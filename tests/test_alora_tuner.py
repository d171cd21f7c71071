"""ALoRA as a PEFT method: batches of every kind, generation with its cache, saving, several adapters, patch."""

import copy

import pytest
import torch
import toy_alora
from peft import PeftModel, get_peft_model
from transformers import DynamicCache

import gci_kernels
from gci_kernels import ALoRAConfig
from gci_kernels.accuracy import relative_error
from gci_kernels.tuners import ALoRALinear

pytestmark = pytest.mark.usefixtures("one_thread")

plain, tolerance = toy_alora.plain, toy_alora.tolerance

TARGETS = {
    "llama": None, "qwen2": None, "qwen3": None, "mistral": None, "gemma2": None,
    "gpt_neox": ["query_key_value", "dense"], "phi": ["q_proj", "k_proj", "v_proj", "dense"],
    "opt": ["q_proj", "fc1", "fc2"], "gpt2": ["c_attn", "c_proj"],
}  # fmt: skip
IDS = torch.tensor([[5, 17, 52, 3, 41, 9, 27], [0, 0, 0, 42, 8, 30, 21], [0, 44, 2, 36, 55, 13, 50]])
MASK = (IDS != 0).long()


def config(family="llama", **changes):
    settings = dict(r=8, num_heads=2, init_weights=False, target_modules=TARGETS[family])
    return ALoRAConfig(**settings | changes)


def adapted(family="llama", **changes):
    torch.manual_seed(1)
    model = plain(family)
    peft_model = gci_kernels.patch(model, config(family, **changes))
    return peft_model.to(model.dtype).eval()  # PEFT keeps adapters of a float64 model in float32


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", TARGETS)
def test_a_padded_batch_equals_its_sequences_alone(family):
    model = adapted(family, residual=family == "phi")
    inputs = dict(input_ids=IDS, attention_mask=MASK)
    if family != "opt":  # which counts positions itself
        inputs["position_ids"] = (MASK.cumsum(1) - 1).clamp(min=0)
    batch = logits(model, **inputs)
    assert relative_error(batch, logits(plain(family), **inputs)) > 1e-3, "the adapter shows"
    for row, ids, mask in zip(batch, IDS, MASK, strict=True):
        alone = logits(model, input_ids=ids[mask.bool()].unsqueeze(0))[0]
        assert relative_error(row[mask.bool()], alone) < tolerance(family)


@pytest.mark.smoke
@pytest.mark.parametrize("family", ("llama", "qwen3", "gpt_neox"))
def test_a_packed_row_equals_its_sequences_alone(family):
    model = adapted(family)
    lengths = (3, 1, 5)
    parts = [torch.randint(1, 60, (1, n)) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    packed = logits(model, input_ids=torch.cat(parts, 1), position_ids=positions, use_cache=False)
    alone = torch.cat([logits(model, input_ids=part) for part in parts], 1)
    assert relative_error(packed, alone) < tolerance(family)


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("kind", ("padded", "packed"))
def test_gradient_checkpointing_changes_nothing(use_reentrant, kind):
    inputs = dict(input_ids=IDS, attention_mask=MASK)
    if kind == "packed":
        inputs = dict(input_ids=IDS, position_ids=torch.tensor([0, 1, 2, 0, 1, 2, 3]).expand(3, -1))
    found = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(**inputs, use_cache=False).logits.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(found[0]) == 3 * 4 * 2
    for name, gradient in found[0].items():
        assert gradient.norm() > 0 and relative_error(found[1][name], gradient) < 1e-10, name


MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "assisted": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ("llama", "gpt_neox"))
def test_generation_equals_recomputing_each_step(family, mode):
    model, ids, mask, new = adapted(family), IDS, MASK, 9
    if mode == "assisted":
        ids = torch.tensor([[5, 17, 52, 3, 5, 17, 52, 9, 5, 17]])
        mask, new = torch.ones_like(ids), 12

    def generate(model, **kwargs):
        torch.manual_seed(3)
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, **kwargs)

    actual = generate(model, **MODES[mode])
    recompute = {k: v for k, v in MODES[mode].items() if k not in ("cache_implementation", "prompt_lookup_num_tokens")}
    assert torch.equal(actual, generate(model, use_cache=False, **recompute))
    assert not torch.equal(actual, generate(plain(family), **MODES[mode]))


def test_logits_of_cached_steps():
    model = adapted()
    whole = logits(model, input_ids=IDS, attention_mask=MASK)
    cache, steps = DynamicCache(config=model.config), []
    for first, last in ((0, 4), (4, 5), (5, 7)):
        part = dict(input_ids=IDS[:, first:last], attention_mask=MASK[:, :last])
        position_ids = (MASK[:, :last].cumsum(1) - 1).clamp(min=0)[:, first:]
        steps.append(logits(model, **part, position_ids=position_ids, past_key_values=cache))
    position_ids = (MASK.cumsum(1) - 1).clamp(min=0)
    whole = logits(model, input_ids=IDS, attention_mask=MASK, position_ids=position_ids)
    real = MASK.bool()
    assert relative_error(torch.cat(steps, 1)[real], whole[real]) < 1e-10


@pytest.mark.parametrize("other", ("plain", "disabled", "another rank"))
def test_a_cache_of_another_model_is_refused_unharmed(other):
    model = adapted()
    filler = {"plain": plain, "disabled": adapted, "another rank": lambda: adapted(r=4)}[other]()
    cache = DynamicCache(config=model.config)
    if other == "disabled":
        with filler.disable_adapter():
            logits(filler, input_ids=IDS, past_key_values=cache)
    else:
        logits(filler, input_ids=IDS, past_key_values=cache)
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(ValueError, match="past_key_values"):
        logits(model, input_ids=IDS[:, :1], past_key_values=cache)
    if other != "another rank":  # found at the first layer's adapter, after nothing was written
        assert all(torch.equal(layer.keys, old) for layer, old in zip(cache.layers, before, strict=True))


@pytest.mark.smoke
def test_save_and_load(tmp_path):
    model = adapted(lora_alpha=20, residual=True)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 60_000
    loaded = PeftModel.from_pretrained(plain(), tmp_path).to(torch.float64).eval()
    expected = logits(model, input_ids=IDS, attention_mask=MASK)
    # The file holds what the adapter held when it was made: float32.
    assert relative_error(logits(loaded, input_ids=IDS, attention_mask=MASK), expected) < 1e-6
    assert loaded.peft_config["default"].num_heads == 2 and loaded.peft_config["default"].residual


def test_disable_and_unload():
    model, base = adapted(), logits(plain(), input_ids=IDS)
    with model.disable_adapter():
        assert torch.equal(logits(model, input_ids=IDS), base)
    assert relative_error(logits(model, input_ids=IDS), base) > 1e-3
    with pytest.raises(ValueError, match="ALoRA cannot be merged.*depends on the other tokens"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="ALoRA cannot be merged"):
        model.merge_adapter()
    plain_again = model.unload()
    assert torch.equal(logits(plain_again, input_ids=IDS), base)
    assert all(type(module).__module__.startswith(("torch", "transformers")) for module in plain_again.modules())


def test_new_adapter_changes_nothing_until_it_learns():
    model = gci_kernels.patch(plain(), ALoRAConfig(r=8, num_heads=4)).to(torch.float64).eval()
    assert torch.equal(logits(model, input_ids=IDS), logits(plain(), input_ids=IDS))
    layer = next(module for module in model.modules() if isinstance(module, ALoRALinear))
    q, k, v = layer.gci_alora_qkv["default"].chunk(3)
    assert torch.equal(v, torch.eye(8).double()) and q.norm() > 0 and k.norm() > 0
    assert not layer.gci_alora_B["default"].any() and layer.scaling["default"] == 4


def test_two_adapters_and_their_caches_keep_apart():
    model = adapted()
    torch.manual_seed(5)
    model.add_adapter("second", config(r=4, num_heads=1))
    model.to(torch.float64).eval()
    single = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        single[name] = model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False)
        again = model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(single[name], again)
    assert not torch.equal(single["default"], single["second"])
    model.base_model.set_adapter(["default", "second"])
    both = model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False)
    again = model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(both, again)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(
        model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False), single["default"]
    )


def test_deepcopy_is_independent():
    model = adapted()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "gci_alora_B" in name:
                parameter.zero_()
    assert torch.equal(logits(twin, input_ids=IDS), logits(plain(), input_ids=IDS))
    assert relative_error(logits(model, input_ids=IDS), logits(plain(), input_ids=IDS)) > 1e-3
    cached = twin.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False)
    assert torch.equal(cached, plain().generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False))


def test_it_learns():
    torch.manual_seed(0)
    model = gci_kernels.patch(plain(), ALoRAConfig(r=8, num_heads=2)).to(torch.float64).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_patch_report_unpatch():
    model = plain()
    classes = [type(module) for module in model.modules()]
    before = logits(model, input_ids=IDS)
    patched = gci_kernels.patch(model, config())
    report = gci_kernels.report(patched)
    assert len(report) == 8 and {layer.method for layer in report} == {"ALoRA r=8, 2 heads"}
    assert "mix=native" in report[0].plan
    back = gci_kernels.unpatch(patched)
    assert back is model and [type(module) for module in model.modules()] == classes
    assert torch.equal(logits(back, input_ids=IDS), before)
    assert not any("gci" in key for module in back.modules() for key in vars(module))


def test_get_peft_model_works_as_patch_does():
    torch.manual_seed(1)
    model = get_peft_model(plain(), config()).to(torch.float64).eval()
    assert torch.equal(logits(model, input_ids=IDS), logits(adapted(), input_ids=IDS))


@pytest.mark.parametrize("inputs", ("plain", "padded"))
def test_compiled_model_equals_the_eager_one(inputs):
    torch.compiler.reset()
    given = dict(input_ids=IDS, use_cache=False) | ({"attention_mask": MASK} if inputs == "padded" else {})
    model = adapted(target_modules=["q_proj", "o_proj"]).train()
    compiled = torch.compile(model, backend="aot_eager")
    found = []
    for each in (model, compiled):
        model.zero_grad()
        logits = each(**given).logits
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert all(relative_error(actual, expected) < 1e-10 for expected, actual in zip(*found, strict=True))


def test_outside_of_its_model_it_says_what_is_missing():
    layer = next(module for module in adapted().modules() if isinstance(module, ALoRALinear))
    with pytest.raises(RuntimeError, match="needs to know the sequences"):
        layer(torch.randn(1, 3, 32, dtype=torch.float64))


BAD = [
    (dict(r=0), ValueError, "r must be at least 1, got 0"),
    (dict(r=257, num_heads=257), ValueError, "r must be at most 256"),
    (dict(r=10, num_heads=4), ValueError, "num_heads must divide r=10, got 4"),
    (dict(r=256, num_heads=2), ValueError, "num_heads must be at least 4 for r=256"),
    (dict(num_heads=True), TypeError, "num_heads must be an integer"),
    (dict(residual=1), TypeError, "residual must be True or False"),
    (dict(lora_dropout=1.0), ValueError, r"lora_dropout must be in \[0, 1\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_config_is_named(change, error, message):
    with pytest.raises(error, match=message):
        ALoRAConfig(**change)


def test_a_failing_patch_leaves_the_model_as_it_was():
    model = plain()
    before = [(type(module), set(vars(module))) for module in model.modules()]
    with pytest.raises(ValueError, match="target_modules: no module is named"):
        gci_kernels.patch(model, config(target_modules=["q_proj", "fc"]))
    with pytest.raises(TypeError, match="input_layernorm is a LlamaRMSNorm; ALoRA adapts"):
        gci_kernels.patch(model, config(target_modules=["q_proj", "input_layernorm"]))
    with pytest.raises(ValueError, match="target_modules: .*leaves out 1 targeted .*: lm_head; nothing is left"):
        gci_kernels.patch(model, config(target_modules=["lm_head"]))
    assert [(type(module), set(vars(module))) for module in model.modules()] == before
