"""Adapted layers in generation: which of them take decoding steps, with the same tokens as without."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from toy_decoding import IDS, METHODS, adapted, config, settings, tiny_llama

from gci_kernels import patch, report
from gci_kernels.accuracy import relative_error

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_generation_takes_steps_and_gives_the_same_tokens(method, dtype, steps, without):
    model = adapted(method, dtype)
    tokens = model.generate(**settings(IDS))
    prompt = [False] * 6 if method == "alora" else []  # ten tokens: more than one for each sequence
    assert steps == prompt + [True] * 7 * 6 or steps == [True] * 8 * 6
    with torch.no_grad():
        one = model(IDS[:, :1]).logits  # where ALoRA's new token is its whole past
        without()
        assert relative_error(model(IDS[:, :1]).logits, one) < (1e-5 if dtype == torch.float32 else 3e-2)
    if dtype == torch.float32:
        assert torch.equal(model.generate(**settings(IDS)), tokens)


@pytest.mark.parametrize("hooked", (False, True))
@pytest.mark.parametrize("method", METHODS)
def test_several_adapters_add_up(method, hooked, steps, without):
    """The second adds to what the first returned, and where the base layer has hooks the first adds to its output."""
    model = adapted(method)
    model.add_adapter("other", config(method))
    patch(model)
    model.eval().base_model.set_adapter(["default", "other"])
    seen = []
    for module in model.modules():
        if hooked and hasattr(module, "base_layer"):
            module.base_layer.register_forward_hook(lambda module, args, y: seen.append((y, y.clone())))
    with torch.no_grad():
        logits = model(IDS[:, :1], use_cache=True).logits
        assert steps == [True] * 12
        assert len(seen) == 6 * hooked and all(torch.equal(*pair) for pair in seen), "what a hook saw is left alone"
        without()
        assert relative_error(logits, model(IDS[:, :1]).logits) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_calls_that_are_no_steps(method, steps):
    model = adapted(method)
    model(IDS[:, :1])  # gradients are wanted
    with torch.no_grad():
        model(IDS.repeat(2, 1))  # too many tokens
        with torch.autocast("cpu", torch.bfloat16):
            model(IDS[:, :1])
        model.double()(IDS[:, :1])  # which no kernel takes
    assert steps == []


class Doubled(nn.Linear):
    """A base layer that only itself knows how to run, as quantised ones are."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("method", METHODS)
def test_a_base_layer_of_another_class_runs_itself(method, steps, without):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.gate_proj.__class__ = Doubled
    torch.manual_seed(1)
    model = patch(model, config(method)).eval()
    with torch.no_grad():
        logits = model(IDS[:, :1], use_cache=True).logits
        assert steps == [True] * 6
        without()
        assert relative_error(logits, model(IDS[:, :1]).logits) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_dropout_in_training_is_no_step_of_the_kernel(method, steps):
    model = adapted(method, lora_dropout=0.5).train()
    with torch.no_grad():
        first, second = (model(IDS[:, :1]).logits for _ in range(2))
        assert not torch.equal(first, second)
        model.eval()(IDS[:, :1], use_cache=True)
    assert steps == [False] * 12 + [True] * 6


MODES = {
    "left-padded": {}, "beams": {"num_beams": 3}, "static": {"cache_implementation": "static"},
    "assisted": {"prompt_lookup_num_tokens": 3},
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_alora_generates_with_steps_what_it_would_without(mode, steps):
    model = adapted("alora").double()  # which no kernel takes: the truth
    ids = torch.tensor([[0, 0, 7, 3, 41], [8, 2, 36, 62, 8]])
    if mode == "assisted":
        ids = torch.tensor([[5, 17, 5, 17, 5]])
    generate = settings(ids, attention_mask=(ids != 0).long(), max_new_tokens=9, **MODES[mode])
    expected = model.generate(**generate)
    assert True not in steps
    model.float()
    del steps[:]
    assert torch.equal(model.generate(**generate), expected) and True in steps


def test_a_layer_of_peft_with_a_bias_of_its_own():
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)
    )
    with torch.no_grad():
        before = model.eval()(IDS[:, :1]).logits
        assert relative_error(patch(model)(IDS[:, :1]).logits, before) < 1e-5


@pytest.mark.smoke
@pytest.mark.parametrize("method", METHODS)
def test_report_names_what_a_step_launches(method):
    model = adapted(method)
    assert {line.decode for line in report(model)} == {"decode"}
    assert "decoding step" in str(report(model))
    assert {line.decode for line in report(model.double())} == {None}
