"""LoRAMoE as the PEFT method GCI_LORAMOE: whole tiny models against a restatement that loops over the experts."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from toy_loramoe import (
    IDS,
    MASK,
    TRAINING_BATCH,
    adapted,
    adapter_gradients,
    assert_same_gradients,
    balanced_config,
    logits,
    moe_config,
    moe_layers,
    restated,
    tiny_llama,
)
from transformers import GPT2Config, GPT2LMHeadModel

from gci_kernels import LoRAMoEConfig, patch
from gci_kernels.accuracy import relative_error
from gci_kernels.tuners import LoRAMoELinear

# The model's output and gradients

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.smoke
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_experts": 1},
        {"top_k": 2},
        {"top_k": 1, "num_experts": 5, "r": 1},
        {"target_modules": "all-linear", "lora_alpha": 1.5},
    ],
    ids=str,
)
def test_output_and_gradients_equal_the_restatement(overrides):
    model = adapted(moe_config(**overrides))
    expected = restated(tiny_llama(), model)
    dout = torch.randn(*IDS.shape, 97, dtype=torch.float64)
    inputs = {}
    for name, each in (("actual", model), ("expected", expected)):
        embedded = each.get_input_embeddings()(IDS).detach().requires_grad_()
        output = each(inputs_embeds=embedded, attention_mask=MASK).logits
        (output * dout).sum().backward()
        inputs[name] = (output, embedded.grad)
    for actual, wanted in zip(inputs["actual"], inputs["expected"], strict=True):
        assert relative_error(actual, wanted) < 1e-10
    if overrides.get("num_experts") == 1 or overrides.get("top_k") == 1:  # a gate that is always 1 has no gradient
        for name, gradient in adapter_gradients(model).items():
            if "loramoe_router" in name:
                assert gradient.abs().max() < 1e-12
                model.get_base_model().get_parameter(name).requires_grad_(False)
                expected.get_parameter(name).requires_grad_(False)
    assert_same_gradients(model, expected)


def test_only_adapters_get_a_gradient():
    model = adapted()
    model(**{**TRAINING_BATCH, "task_types": None}).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("loramoe_" in name), name


def test_new_adapter_changes_nothing():
    model = adapted(moe_config(init_weights=True))
    assert all(not layer.loramoe_lora_B["default"].any() for layer in moe_layers(model).values())
    torch.testing.assert_close(logits(model), logits(tiny_llama()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("overrides", "leaves", "layers"),
    [
        ({}, {"gate_proj", "up_proj", "down_proj"}, {"0", "1"}),
        ({"target_modules": ["q_proj", "up_proj"]}, {"q_proj", "up_proj"}, {"0", "1"}),
        ({"target_modules": r".*\.1\.mlp\.(gate|up)_proj"}, {"gate_proj", "up_proj"}, {"1"}),
        (
            {"target_modules": "all-linear"},
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
            {"0", "1"},
        ),
        ({"exclude_modules": ["up_proj"]}, {"gate_proj", "down_proj"}, {"0", "1"}),
        ({"target_modules": ["up_proj"], "layers_to_transform": [1]}, {"up_proj"}, {"1"}),
    ],
    ids=["default", "names", "pattern", "all-linear", "exclude", "layers_to_transform"],
)
def test_targets(overrides, leaves, layers):
    names = [name.split(".") for name in moe_layers(adapted(moe_config(**overrides)).get_base_model())]
    assert {(name[2], name[-1]) for name in names} == {(layer, leaf) for layer in layers for leaf in leaves}


def test_conv1d_base():
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=97, n_positions=16)).double().eval()
    model = get_peft_model(copy.deepcopy(plain), moe_config(target_modules=["c_fc"])).eval()
    expected = restated(plain, model)
    outputs = [each(input_ids=IDS).logits for each in (model, expected)]
    assert relative_error(*outputs) < 1e-10
    for output in outputs:
        output.square().sum().backward()
    assert_same_gradients(model, expected)


def test_hook_on_base_layer_fires_and_its_change_is_kept():
    seen = []

    def double(module, args, output):
        seen.append(module)
        return 2 * output

    plain = tiny_llama().eval()
    plain.model.layers[0].mlp.up_proj.register_forward_hook(double)
    model = adapted()
    base_layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base_layer
    base_layer.register_forward_hook(double)
    assert relative_error(logits(model), logits(restated(plain, model))) < 1e-10
    assert seen[0] is base_layer and len(seen) == 2


def test_dropout_acts_in_training_only():
    dropping, plain = adapted(moe_config(lora_dropout=0.5)), adapted()
    assert torch.equal(logits(dropping), logits(plain))
    dropping.train()
    torch.manual_seed(0)
    first, second = dropping(input_ids=IDS).logits, dropping(input_ids=IDS).logits
    torch.manual_seed(0)
    assert relative_error(first, second) > 1e-3
    assert torch.equal(dropping(input_ids=IDS).logits, first)


def test_generates_the_same_tokens_as_the_restatement():
    model = adapted(dtype=torch.float32).eval()
    expected = restated(tiny_llama(torch.float32), model)
    settings = {"attention_mask": MASK, "max_new_tokens": 8, "do_sample": False}
    tokens = model.generate(input_ids=IDS, **settings)
    assert tokens.shape == (3, 15)
    assert torch.equal(tokens, expected.generate(input_ids=IDS, **settings))


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_autocast_adapter_dtype(autocast, dtype):
    model = get_peft_model(tiny_llama(torch.bfloat16), moe_config(), autocast_adapter_dtype=autocast)
    output = model(input_ids=IDS).logits
    output.float().square().mean().backward()
    assert output.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (dtype if "loramoe_" in name else torch.bfloat16), name
    assert all(gradient.dtype == dtype and gradient.any() for gradient in adapter_gradients(model).values())


def test_twenty_steps_of_adamw_lower_the_loss_and_leave_the_base_alone():
    model = adapted(balanced_config(init_weights=True), torch.float32)
    plain = tiny_llama(torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        output = model(**TRAINING_BATCH)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(logits(model.unload()), logits(plain))


# Saving, copying


@pytest.mark.smoke
def test_save_and_load(tmp_path):
    config = balanced_config(top_k=2, balance_include_padding=True, lora_dropout=0.25, task_type="CAUSAL_LM")
    model = adapted(config, torch.float32)
    model.save_pretrained(tmp_path)

    weights = load_file(tmp_path / "adapter_model.safetensors")
    parts = {"loramoe_A", "loramoe_lora_B", "loramoe_router", "loramoe_settings._extra_state"}
    assert set(weights) == {f"{name}.{part}" for name in moe_layers(model) for part in parts}

    loaded_config = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded_config) is LoRAMoEConfig
    own = {field.name for field in dataclasses.fields(LoRAMoEConfig)} - {"inference_mode", "base_model_name_or_path"}
    for name in own:
        assert getattr(loaded_config, name) == getattr(config, name), name

    loaded = PeftModel.from_pretrained(tiny_llama(torch.float32), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_loaded_model_trains_with_its_balance_loss(tmp_path):
    model = adapted(balanced_config())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).train()
    for each in (model, loaded):
        each(**TRAINING_BATCH).loss.backward()
    assert_same_gradients(loaded, model, tolerance=1e-15)


def _torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_independent_and_compute_the_same(duplicate):
    model = adapted(balanced_config())
    twin = duplicate(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    for each in (model, twin):
        each.train()(**TRAINING_BATCH).loss.backward()
    assert_same_gradients(twin, model, tolerance=1e-15)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(model), before)


# Several adapters


@pytest.fixture
def two_adapters() -> PeftModel:
    """Adapter "default" on gate, up and down, and "other" of another shape on up and q."""
    model = adapted()
    torch.manual_seed(2)
    model.add_adapter("other", moe_config(r=2, num_experts=6, top_k=3, target_modules=["up_proj", "q_proj"]))
    return model


@pytest.mark.parametrize("names", [["default"], ["other"], ["default", "other"]], ids="+".join)
def test_active_adapters_add_up(two_adapters, names):
    two_adapters.base_model.set_adapter(names)
    two_adapters.train()
    expected = restated(tiny_llama(), two_adapters, names)
    outputs = [each(input_ids=IDS, attention_mask=MASK).logits for each in (two_adapters, expected)]
    assert relative_error(*outputs) < 1e-10
    for output in outputs:
        output.square().sum().backward()
    assert_same_gradients(two_adapters, expected)


def test_added_adapter_is_neither_active_nor_trained(two_adapters):
    assert torch.equal(logits(two_adapters), logits(adapted()))
    for name, parameter in two_adapters.named_parameters():
        assert parameter.requires_grad == ("loramoe_" in name and "default" in name), name


def test_deleted_adapter_is_gone(two_adapters):
    two_adapters.delete_adapter("other")
    assert not any("other" in name for name in two_adapters.state_dict())
    for layer in moe_layers(two_adapters).values():
        assert not any("other" in setting for setting in vars(layer).values() if isinstance(setting, dict))
    assert torch.equal(logits(two_adapters), logits(adapted()))


def test_disabled_adapters_give_the_base_model_exactly():
    model = adapted(balanced_config())
    with_adapters = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))
        assert "balance_loss" not in model.train()(**TRAINING_BATCH)
    assert torch.equal(logits(model), with_adapters)
    assert relative_error(with_adapters, logits(tiny_llama())) > 1e-2


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.merge_and_unload(),
        lambda model: next(iter(moe_layers(model).values())).merge(),
    ],
    ids=["merge_adapter", "merge_and_unload", "layer"],
)
def test_merge_raises_and_leaves_the_model_usable(merge):
    model = adapted(balanced_config())
    before, loss = logits(model), model.train()(**TRAINING_BATCH).balance_loss
    with pytest.raises(ValueError, match="cannot be merged"):
        merge(model)
    assert torch.equal(logits(model), before)
    assert torch.equal(model.train()(**TRAINING_BATCH).balance_loss, loss)


def test_unload_returns_the_plain_model():
    plain = tiny_llama()
    model = get_peft_model(plain, balanced_config())
    model(**TRAINING_BATCH).loss.backward()
    unloaded = model.unload()
    assert unloaded is plain
    assert [type(module) for module in unloaded.modules()] == [type(module) for module in tiny_llama().modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unloaded.modules())
    assert torch.equal(logits(unloaded), logits(tiny_llama()))


# Bad configurations


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("r", 0, ValueError),
        ("r", 2.0, TypeError),
        ("r", True, TypeError),
        ("num_experts", 0, ValueError),
        ("num_experts", 257, ValueError),
        ("num_experts", "8", TypeError),
        ("num_experts", None, TypeError),
        ("top_k", 0, ValueError),
        ("top_k", 9, ValueError),
        ("top_k", 1.5, TypeError),
        ("lora_alpha", float("nan"), ValueError),
        ("lora_alpha", float("inf"), ValueError),
        ("lora_alpha", "32", TypeError),
        ("lora_alpha", None, TypeError),
        ("lora_dropout", 1.0, ValueError),
        ("lora_dropout", -0.1, ValueError),
        ("lora_dropout", float("nan"), ValueError),
        ("lora_dropout", "0.1", TypeError),
        ("balance_weight", -0.1, ValueError),
        ("balance_weight", float("inf"), ValueError),
        ("balance_weight", "0.1", TypeError),
        ("balance_delta", 1.5, ValueError),
        ("balance_delta", float("nan"), ValueError),
        ("balance_delta", None, TypeError),
    ],
)
def test_bad_config_names_the_argument(argument, value, error):
    with pytest.raises(error, match=f"^{argument} must be .*{value}"):
        LoRAMoEConfig(**{argument: value})


def test_odd_number_of_experts_needs_no_balance():
    LoRAMoEConfig(num_experts=3)
    with pytest.raises(ValueError, match="^num_experts must be even where balance_weight is not 0, got 3"):
        LoRAMoEConfig(num_experts=3, balance_weight=0.1)


def test_pattern_of_targets_excludes_layers_to_transform():
    with pytest.raises(ValueError, match="layers_to_transform.*target_modules"):
        LoRAMoEConfig(target_modules=".*up_proj", layers_to_transform=[0])


def test_unsupported_target_is_named():
    with pytest.raises(TypeError, match="target_modules: model.embed_tokens is a Embedding"):
        get_peft_model(tiny_llama(), moe_config(target_modules=["embed_tokens"]))


def test_new_layers_take_the_mode_of_the_layers_they_replace():
    for training in (True, False):
        model = patch(tiny_llama().train(training), LoRAMoEConfig(lora_dropout=0.5))
        assert {layer.training for layer in model.modules() if isinstance(layer, LoRAMoELinear)} == {training}
