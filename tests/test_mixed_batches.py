"""Batches in which every sequence has an adapter of its own (adapter_names): what each would give alone."""

import copy

import pytest
import torch
from peft import get_peft_model
from toy_decoding import IDS, METHODS, adapted, config, settings, tiny_llama
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from gci_kernels import LoKIConfig, patch
from gci_kernels.accuracy import relative_error
from gci_kernels.ops.decode import native

pytestmark = pytest.mark.usefixtures("poisoned")


NAMES = ["other", "__base__", "default", "other"]
BATCH = torch.cat((IDS, IDS.flip(1)))


def with_two(method):
    model = adapted(method)
    torch.manual_seed(2)
    if method == "lora":
        changes = {"r": 6}
    else:
        changes = {
            "alora": dict(r=12, num_heads=3, residual=True),
            "loramoe": dict(num_experts=2, top_k=1),
            "hydralora": dict(r=3),
        }.get(method, {})
    second = LoKIConfig(positions=[[1, 5]] * 2) if method == "loki" else config(method, **changes)
    model.add_adapter("other", second)
    patch(model)
    for name, parameter in model.named_parameters():
        if "loki_active" in name:
            parameter.data.normal_()
    return model.eval()


def alone(model, call):
    """What each sequence gives when it runs by itself, with its adapter alone."""
    results = []
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                results.append(call(row))
        else:
            model.set_adapter(name)
            results.append(call(row))
    return torch.cat(results)


@pytest.mark.parametrize("method", (*METHODS, "hydralora", "loki"))
@pytest.mark.parametrize("length", (1, 4, 5))
def test_every_sequence_has_an_adapter_of_its_own(method, length):
    """Up to sixteen tokens a step of the kernel, else the stages of training; never an adapter of another row."""
    model, ids = with_two(method), BATCH[:, :length]
    with torch.no_grad():
        wanted = alone(model, lambda row: model(ids[row : row + 1]).logits)
        actual = model(ids, adapter_names=NAMES).logits
        assert relative_error(actual, wanted) < 1e-5
    with_gradients = model(ids, adapter_names=NAMES).logits
    assert relative_error(with_gradients, wanted) < 1e-5 and with_gradients.requires_grad


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ({}, {"num_beams": 2}, {"cache_implementation": "static"}), ids=str)
def test_generation_of_a_mixed_batch(method, mode, monkeypatch):
    """One call of the extension a layer and step, and the tokens that every sequence gets by itself."""
    model, calls = with_two(method), []
    for run in ("run", "attend"):
        own = getattr(native.Step, run)
        monkeypatch.setattr(native.Step, run, lambda *args, own=own: calls.append(1) or own(*args))
    wanted = alone(model, lambda row: model.generate(**settings(BATCH[row : row + 1], **mode)))
    del calls[:]
    tokens = model.generate(**settings(BATCH, **mode), adapter_names=NAMES)
    assert torch.equal(tokens, wanted)
    assert len(calls) == 7 * 6


REPEATS = {
    "generation_config=": dict(
        generation_config=GenerationConfig(num_beams=3, do_sample=False, max_new_tokens=4, pad_token_id=0)
    ),
    "the model's": dict(do_sample=False, max_new_tokens=4),
    "sequences": dict(do_sample=True, top_k=1, num_return_sequences=3, max_new_tokens=4),
    "beams and sequences": dict(do_sample=False, num_beams=3, num_return_sequences=2, max_new_tokens=4),
}  # fmt: skip


@pytest.mark.parametrize("method", (*METHODS, "hydralora", "loki"))
@pytest.mark.parametrize("kind", REPEATS)
def test_rows_that_generate_makes_of_each_input(method, kind):
    model = with_two(method)
    if kind == "the model's":
        model.get_base_model().generation_config.num_beams = 3
    mask = torch.ones_like(BATCH)
    wanted = alone(model, lambda row: model.generate(BATCH[row : row + 1], attention_mask=mask[:1], **REPEATS[kind]))
    assert torch.equal(model.generate(BATCH, attention_mask=mask, **REPEATS[kind], adapter_names=NAMES), wanted)


@pytest.mark.parametrize("method", (*METHODS, "hydralora", "loki"))
def test_layers_that_get_tokens_without_a_batch(method):
    """OPT's MLP: [batch * time, features]."""
    torch.manual_seed(0)
    opt = OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, init_std=0.2,
    )  # fmt: skip
    second = config(method, target_modules=["fc1", "fc2"])
    if method == "loki":
        second = LoKIConfig(positions=[[1, 5]] * 2)
    first = copy.deepcopy(second)
    model = get_peft_model(OPTForCausalLM(opt), first)
    model.add_adapter("other", second)
    if method == "lora":
        patch(model)
    for name, parameter in model.named_parameters():
        if "loki_active" in name:
            parameter.data.normal_()
    model.eval()
    with torch.no_grad():
        for ids in (BATCH, BATCH.repeat(1, 4)):
            wanted = alone(model, lambda row, ids=ids: model(ids[row : row + 1]).logits)
            assert relative_error(model(ids, adapter_names=NAMES).logits, wanted) < 1e-5
    for mode in ({}, {"num_beams": 2}):
        wanted = alone(model, lambda row, mode=mode: model.generate(**settings(BATCH[row : row + 1], **mode)))
        assert torch.equal(model.generate(**settings(BATCH, **mode), adapter_names=NAMES), wanted)


@pytest.mark.parametrize("method", ("lora", "loramoe"))
def test_an_encoder_sees_each_input_once(method):
    torch.manual_seed(0)
    t5 = T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        initializer_factor=4.0,
    )  # fmt: skip
    made = config(method, target_modules=["q", "wo"])
    model = get_peft_model(T5ForConditionalGeneration(t5), made)
    model.add_adapter("other", copy.deepcopy(made))
    if method == "lora":
        patch(model)
    model.eval()
    for mode in ({}, {"num_beams": 3}):
        wanted = alone(model, lambda row, mode=mode: model.generate(**settings(BATCH[row : row + 1], **mode)))
        assert torch.equal(model.generate(**settings(BATCH, **mode), adapter_names=NAMES), wanted)
    with torch.no_grad():
        labels = BATCH[:, :3].contiguous()
        wanted = alone(model, lambda row: model(input_ids=BATCH[row : row + 1], labels=labels[row : row + 1]).logits)
        assert relative_error(model(input_ids=BATCH, labels=labels, adapter_names=NAMES).logits, wanted) < 1e-5


def tiny_llava():
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    whole = LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=96, vision_feature_select_strategy="full",
        image_seq_length=5, vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(whole)


def llava_with_adapters(method):
    made = config(method, target_modules=["q_proj", "fc1", "linear_1"])
    model = get_peft_model(tiny_llava(), made)
    model.add_adapter("other", copy.deepcopy(made))
    if method == "lora":
        patch(model)
    return model.eval()


@pytest.mark.parametrize("method", ("lora", "loramoe"))
def test_images_of_each_input(method):
    """The tower sees images, of which two may be one input's; where inputs have different numbers it is refused."""
    model = llava_with_adapters(method)
    one = [96] * 5
    ids = torch.tensor([[3, *one, 7, *one, row + 2] for row in range(4)])
    pixels = torch.randn(8, 3, 8, 8)

    def row_alone(row):
        return model(input_ids=ids[row : row + 1], pixel_values=pixels[2 * row : 2 * row + 2]).logits

    with torch.no_grad():
        wanted = alone(model, row_alone)
        actual = model(input_ids=ids, pixel_values=pixels, adapter_names=NAMES).logits
        assert relative_error(actual, wanted) < 1e-5
        uneven = ids.clone()
        uneven[0, 1:6] = 4
        with pytest.raises(ValueError, match="different numbers of images|Length of `adapter_names`"):
            model(input_ids=uneven, pixel_values=pixels[1:], adapter_names=NAMES)
        uneven[1, 1:6], uneven[1, 7:12], uneven[2, 7:12] = 4, 4, 4  # as many images as inputs, two of them one's
        with pytest.raises(ValueError, match="different numbers of images"):
            model(input_ids=uneven, pixel_values=pixels[:4], adapter_names=NAMES)
        with pytest.raises(ValueError, match="different numbers of images"):
            model(uneven, pixels[:4], adapter_names=NAMES)


@pytest.mark.parametrize("method", ("lora", "loramoe"))
@pytest.mark.parametrize("beams", (1, 2))
def test_images_in_generation(method, beams):
    """generate() runs the tower before it calls the model."""
    model = llava_with_adapters(method)
    one = [96] * 5
    ids, pixels = torch.tensor([[3, *one, 7, *one, row + 2] for row in range(4)]), torch.randn(8, 3, 8, 8)
    options = dict(max_new_tokens=1, num_beams=beams, do_sample=False, return_dict_in_generate=True, output_logits=True)

    def logits(rows, **names):
        first = slice(2 * rows.start, 2 * rows.stop)
        return model.generate(input_ids=ids[rows], pixel_values=pixels[first], **options, **names).logits[0]

    wanted = alone(model, lambda row: logits(slice(row, row + 1)))
    assert relative_error(logits(slice(0, 4), adapter_names=NAMES), wanted) < 1e-5
    ids[1, 1:6], ids[1, 7:12], ids[2, 7:12] = 4, 4, 4
    with pytest.raises(ValueError, match="different numbers of images|Length of `adapter_names`"):
        model.generate(input_ids=ids, pixel_values=pixels[:5], adapter_names=NAMES, **options)


class Mixture(torch.nn.Module):
    """Sends some tokens to each of two experts, the second choice's first."""

    def __init__(self, model):
        super().__init__()
        self.config, self.shared = model.config, torch.nn.Linear(8, 8)
        self.experts = torch.nn.ModuleList(torch.nn.ModuleDict({"up": torch.nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, inputs_embeds):
        tokens = inputs_embeds.flatten(0, 1)
        y = self.shared(tokens)
        for number, expert in enumerate(self.experts):
            chosen = (tokens[:, 0] > 0).int().eq(number).nonzero().view(-1).flip(0)
            if not chosen.numel():
                continue
            y = y.index_add(0, chosen, expert["up"](tokens[chosen]))
        return y.view_as(inputs_embeds)


@pytest.mark.parametrize("method", ("lora", "loramoe"))
def test_experts_of_a_mixture(method):
    """A shared one sees all tokens in their order; of the others nobody knows whose tokens they get."""
    x = torch.randn(4, 3, 8)
    for targets, refused in ((["shared"], False), (["shared", "up"], True)):
        made = config(method, target_modules=targets)
        model = get_peft_model(Mixture(tiny_llama()), made)
        model.add_adapter("other", copy.deepcopy(made))
        if method == "lora":
            patch(model)
        model.eval()
        with torch.no_grad():
            if refused:
                for some in (x, x.abs()):  # one expert gets all tokens, in another order
                    with pytest.raises(ValueError, match="adapter_names: a layer of one expert|Length of `adapter_"):
                        model(inputs_embeds=some, adapter_names=NAMES)
                continue
            wanted = alone(model, lambda row, model=model: model(inputs_embeds=x[row : row + 1]))
            assert relative_error(model(inputs_embeds=x, adapter_names=NAMES), wanted) < 1e-5


@pytest.mark.parametrize("method", (*METHODS, "hydralora", "loki"))
def test_another_model_that_runs_meanwhile(method):
    """The names are for the layers of one model."""
    model, other = with_two(method), with_two(method)
    inner = other.get_base_model()  # no PeftModel around it
    other.set_adapter("other")
    seen = []

    def run_other(module, args):
        seen.append(inner(BATCH).logits)

    with torch.no_grad():
        wanted, mixed = inner(BATCH).logits, model(BATCH, adapter_names=NAMES).logits
        model.get_base_model().lm_head.register_forward_pre_hook(run_other)
        assert torch.equal(model(BATCH, adapter_names=NAMES).logits, mixed)
    assert len(seen) == 1 and torch.equal(seen[0], wanted)


@pytest.mark.parametrize("method", ("lora", "loramoe", "loki"))
def test_compiled_layers_follow_the_names(method):
    model = with_two(method)
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = [model(BATCH, adapter_names=names).logits for names in (NAMES, NAMES[::-1])] + [model(BATCH).logits]
        for layer in model.get_base_model().model.layers:
            (layer.mlp.down_proj if method == "loki" else layer.mlp.gate_proj).compile(backend="eager")
        found = [model(BATCH, adapter_names=names).logits for names in (NAMES, NAMES[::-1])] + [model(BATCH).logits]
    assert all(relative_error(a, w) < 1e-5 for a, w in zip(found, wanted, strict=True))


def test_a_mixed_batch_of_layers_without_some_adapter():
    model = adapted("loramoe")
    model.add_adapter("other", config("loramoe", target_modules=["up_proj"]))
    model.eval()
    with torch.no_grad():
        actual = model(BATCH, adapter_names=NAMES).logits
        assert relative_error(actual, alone(model, lambda row: model(BATCH[row : row + 1]).logits)) < 1e-5


@pytest.mark.smoke
@pytest.mark.parametrize("method", ("loramoe", "alora", "loki"))
def test_wrong_names_are_named(method):
    model = with_two(method)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    for names, error, message in (
        (["default"] * 3, ValueError, "for each of the 4 inputs, got 3"),
        (["default", "othr", "__base__", "other"], ValueError, r"no adapter \['othr'\]; there are .*'default'"),
        ("default", TypeError, "adapter_names must be a list of strings"),
    ):
        with pytest.raises(error, match=message):
            model(BATCH, adapter_names=names)
    with pytest.raises(ValueError, match="for inference"):
        model.train()(BATCH, adapter_names=NAMES)
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    with torch.no_grad():
        model.eval()(BATCH)


def test_a_cache_of_a_mixed_batch_goes_on_with_the_same_names_only():
    model = with_two("alora")
    with torch.no_grad():
        cache = model(BATCH, adapter_names=NAMES, use_cache=True).past_key_values
        for names in (None, NAMES[::-1]):
            with pytest.raises(ValueError, match="holds 5 tokens, but 0 tokens of adapter"):
                model(BATCH[:, :1], past_key_values=copy.deepcopy(cache), adapter_names=names)
        together = model(torch.cat((BATCH, BATCH[:, :1]), 1), adapter_names=NAMES).logits[:, -1:]
        actual = model(BATCH[:, :1], past_key_values=cache, adapter_names=NAMES).logits
        assert relative_error(actual, together) < 1e-5


@pytest.mark.parametrize("method", ("lora", "loramoe"))
def test_dropout_in_training_is_no_mixed_step_either(method):
    layer = adapted(method, lora_dropout=0.5).train().base_model.model.model.layers[0].mlp.gate_proj
    x, names = torch.randn(2, 1, 64), ["default", "__base__"]
    with torch.no_grad():
        first, second = (layer(x, adapter_names=names) for _ in range(2))
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_a_mixed_batch_trains_after_inference_mode():
    model = with_two("lora")
    with torch.inference_mode():
        model(BATCH, adapter_names=NAMES)
    model(BATCH, adapter_names=NAMES).logits.sum().backward()


@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("method", (*METHODS, "hydralora", "loki"))
def test_what_a_base_layer_returned_is_left_as_it_was(method, tokens):
    """A hook may keep it; neither a decoding step nor the layers' own products write into it."""
    model, seen = with_two(method), []
    for name, module in model.named_modules():
        if name.endswith("down_proj.base_layer"):
            module.register_forward_hook(lambda module, args, y: seen.append((y, y.clone())))
    with torch.no_grad():
        model(input_ids=BATCH[:, :1].repeat(1, tokens), adapter_names=NAMES)
    assert len(seen) == 2 and all(torch.equal(y, copied) for y, copied in seen)


@pytest.mark.parametrize("method", ("lora", "loramoe", "hydralora", "loki"))
def test_a_base_layer_that_returns_another_dtype(method):
    """As quantised ones may; a decoding step of float32 cannot be added to it."""
    layer, x = with_two(method).base_model.model.model.layers[0].mlp.down_proj, torch.randn(4, 1, 96)
    with torch.no_grad():
        expected = layer(x, adapter_names=NAMES)
        layer.base_layer.register_forward_hook(lambda module, args, y: y.double())
        y = layer(x, adapter_names=NAMES)
    assert y.dtype == torch.float64 and relative_error(y, expected) < 1e-6
