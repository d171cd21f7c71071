"""Layers that are given the same tensor: which become groups, and when these fall apart."""

from collections import Counter

import pytest
import torch
from peft import LoraConfig
from torch import nn
from toy_lora import IDS, assert_same, lora_config, run, tiny_llama
from toy_shared_input import (  # noqa: F401  # no_groups is a fixture
    ALL,
    CONFIGS,
    X,
    assert_steps,
    block,
    expected_groups,
    groups_of,
    no_groups,
    patched,
    step,
)

import gci_kernels
from gci_kernels.accuracy import relative_error
from gci_kernels.ops.bottleneck import stages
from gci_kernels.tuners import shared_input

pytestmark = pytest.mark.usefixtures("no_groups")


@pytest.mark.smoke
@pytest.mark.parametrize("method", CONFIGS)
def test_groups_are_found_and_change_no_result(method):
    model, reference = patched(method), patched(method, impl="reference")
    reference.load_state_dict(model.state_dict())
    run(model, use_cache=False)
    assert not shared_input._groups, "they change when a forward begins"
    for _ in range(2):
        assert_same(model, reference, use_cache=False)
        assert groups_of(model) == expected_groups(0, 1)


@pytest.mark.parametrize("method", CONFIGS)
def test_x_is_read_once_by_each_group(method, monkeypatch):
    """In a decoder layer q, k, v together, o, gate and up together, and down read their x: four times, not seven."""
    model, counts = patched(method), Counter()
    for stage, wide in (("project", 0), ("reduce", 1)):
        original = getattr(stages, stage)

        def counted(plan, *args, original=original, stage=stage, wide=wide):
            counts[stage] += 1
            return original(plan, *args)

        monkeypatch.setattr(stages, stage, counted)
    run(model, use_cache=False)
    assert counts == {"project": 2 * (7 + 7), "reduce": 2 * (7 + 7)}, "x, and dY"
    counts.clear()
    run(model, use_cache=False)
    assert counts == {"project": 2 * (4 + 7), "reduce": 2 * (4 + 7)}


def test_only_q_and_v_are_adapted():
    model = gci_kernels.patch(tiny_llama(), lora_config(target_modules=["q_proj", "v_proj"])).eval()
    for _ in range(2):
        run(model)
    assert groups_of(model) == [[f"{number}.self_attn.{name}_proj" for name in "qv"] for number in (0, 1)]


def test_evaluation_and_generation_make_no_groups():
    model = patched()
    for _ in range(2):
        run(model, backward=False)
        model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False)
    assert not shared_input._groups and not shared_input._found


def test_dropout_keeps_layers_apart():
    """The masks of separate layers are independent."""
    model = gci_kernels.patch(tiny_llama(), lora_config(target_modules=ALL, lora_dropout=0.1)).train()
    for _ in range(2):
        run(model)
    assert not shared_input._groups
    model.eval()
    for _ in range(2):
        run(model)
    assert groups_of(model) == expected_groups(0, 1)
    model.train()
    run(model)
    assert not shared_input._given_up


def test_the_frozen_embeddings_output_needs_no_gradient():
    fused, plain = block()
    for _ in range(3):
        fused(X).square().sum().backward()
        plain(X).square().sum().backward()
    for (name, actual), expected in zip(fused.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            assert relative_error(actual.grad, expected.grad) <= 1e-10, name
    assert len(groups_of(fused)) == 1


@pytest.mark.parametrize("part", [slice(0, 10), slice(10, 17), slice(17, 26)], ids=("first", "second", "third"))
def test_the_loss_uses_one_layer(part):
    fused, plain = block()
    for _ in range(3):
        assert_steps(fused, plain, X, loss=lambda y: y.square().sum())
    actual = step(fused, X, lambda y: y[..., part].square().sum())
    expected = step(plain, X, lambda y: y[..., part].square().sum())
    for name, value in expected.items():
        assert (actual[name] is None or not actual[name].any()) if value is None else (
            relative_error(actual[name], value) <= 1e-10 or not value.any() and not actual[name].any()
        ), name  # fmt: skip


CHANGES = {
    "another tensor": lambda x: x + 1,
    "an equal tensor": lambda x: x.clone(),
    "a view": lambda x: x.view(x.shape),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_x_ends_the_group(change):
    fused, plain = block()
    for _ in range(2):
        assert_steps(fused, plain, X)
    assert groups_of(fused) == [[f"base_model.model.{name}" for name in ("first", "second", "third")]]
    for model in (fused, plain):
        model.base_model.model.between = CHANGES[change]
    for _ in range(3):
        assert_steps(fused, plain, X)
    assert groups_of(fused) == []


def test_a_change_of_x_in_place_ends_the_group():
    """Autograd itself refuses a change of x before the first layer's backward; without that layer's it may happen."""
    fused, _ = block()
    x = X.clone()
    for _ in range(2):
        fused(x).sum().backward()
    assert len(groups_of(fused)) == 1

    def between(x):
        with torch.no_grad():
            x.add_(1)
        return x

    layers = fused.base_model.model
    layers.between = between
    y = fused(X)
    apart = torch.cat([layers.second(X * 1 + 1), layers.third(X * 1 + 1)], dim=-1).sin()
    assert torch.equal(y[..., 10:], apart)
    fused(X)
    assert groups_of(fused) == []


def double(layer):
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(2)


def replace(layer):
    layer.lora_B["default"].weight = nn.Parameter(layer.lora_B["default"].weight * 3)


def alias(layer):
    """The same values at the same address, for another parameter's gradient."""
    layer.lora_B["default"].weight = nn.Parameter(layer.lora_B["default"].weight.data)


@pytest.mark.parametrize("change", [double, replace, alias])
def test_a_parameter_that_changes_between_calls(change):
    fused, plain = block()
    for _ in range(2):
        assert_steps(fused, plain, X)
    for model in (fused, plain):
        layers = model.base_model.model
        layers.between = lambda x, layers=layers: (change(layers.second), x)[1]
    actual, expected = fused(X), plain(X)
    assert relative_error(actual, expected) <= 1e-12
    if change is not double:  # autograd refuses a change of what the first layer's graph holds
        actual.sum().backward(), expected.sum().backward()
        grads = [model.base_model.model.second.lora_B["default"].weight.grad for model in (fused, plain)]
        assert relative_error(*grads) <= 1e-12
    fused(X)
    assert groups_of(fused) == []


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_hook_that_changes_x_keeps_the_layer_apart(name):
    fused, plain = block()
    for model in (fused, plain):
        layer = model.base_model.model.get_submodule(name)
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    for _ in range(4):
        assert_steps(fused, plain, X)
    grouped = {each.rpartition(".")[2] for group in groups_of(fused) for each in group}
    assert name not in grouped


def test_hooks_see_every_layers_own_call():
    fused, plain = block()
    seen = [], []
    for model, kept in zip((fused, plain), seen, strict=True):
        for layer in (model.base_model.model.first, model.base_model.model.second):
            layer.register_forward_hook(lambda module, args, y, kept=kept: kept.append((args[0], y)))
    for _ in range(3):
        assert_steps(fused, plain, X)
    for (x, y), (x2, y2) in zip(*seen, strict=True):
        assert torch.equal(x, x2) and relative_error(y, y2) <= 1e-12
    assert len(groups_of(fused)) == 1  # which shares when the hooks are gone


def scale_weight(module, factor):
    module.lora_A["default"].weight.data.mul_(factor)


def clip_weight(module, factor):
    with torch.no_grad():
        module.lora_A["default"].weight.clamp_(-0.05 * factor, 0.05 * factor)


@pytest.mark.parametrize("change", [scale_weight, clip_weight])
@pytest.mark.parametrize("grouped_before", [True, False])
def test_hooks_that_change_a_weight_see_their_own_layers_call(change, grouped_before):
    """As fake quantisation and clipping do; the first leaves no trace that autograd knows of."""
    fused, plain = block()
    for _ in range(2 if grouped_before else 0):
        assert_steps(fused, plain, X)
    for model in (fused, plain):
        layer = model.base_model.model.second
        layer.register_forward_pre_hook(lambda module, args: change(module, 0.5))
        if change is scale_weight:
            layer.register_forward_hook(lambda module, args, y: change(module, 2.0))
    for _ in range(3):
        assert_steps(fused, plain, X)


@pytest.mark.parametrize("everywhere", [True, False])
def test_hooks_that_change_x_behind_autograds_back(everywhere):
    def double(module, args, y):
        if module in layers:
            args[0].data.mul_(2)

    fused, plain = block()
    layers = {model.base_model.model.first for model in (fused, plain)}
    assert_steps(fused, plain, X)
    register = torch.nn.modules.module.register_module_forward_hook
    handles = [register(double)] if everywhere else [layer.register_forward_hook(double) for layer in layers]
    for _ in range(3):
        assert_steps(fused, plain, X)
    for handle in handles:
        handle.remove()


def test_full_backward_hooks_keep_the_layer_apart():
    fused, plain = block()
    seen = [], []
    for model, kept in zip((fused, plain), seen, strict=True):
        model.base_model.model.second.register_full_backward_hook(
            lambda module, dx, dy, kept=kept: kept.append((dx[0], dy[0]))
        )
    for _ in range(3):
        assert_steps(fused, plain, X)
    for pair, expected in zip(*seen, strict=True):
        assert all(relative_error(a, b) <= 1e-10 for a, b in zip(pair, expected, strict=True))


def disable(model):
    for layer in ("second", "first"):
        model.base_model.model.get_submodule(layer).enable_adapters(False)


def merge(model):
    model.base_model.model.second.merge()


def switch(model):
    if "other" not in model.peft_config:
        model.add_adapter("other", LoraConfig(r=2, target_modules=["second", "third"], init_lora_weights=False))
    model.set_adapter("other")


def delete(model):
    model.base_model.model.second.delete_adapter("default")


@pytest.mark.parametrize("change", [disable, merge, switch, delete])
@pytest.mark.parametrize("when", ["between steps", "between calls"])
def test_a_layer_whose_adapter_changes_computes_by_itself_at_once(change, when):
    fused, plain = block()
    if change is switch:
        fused.add_adapter("other", LoraConfig(r=2, target_modules=["second", "third"], init_lora_weights=False))
        plain.add_adapter("other", LoraConfig(r=2, target_modules=["second", "third"]))
        plain.load_state_dict(fused.state_dict())
        fused.set_adapter("default"), plain.set_adapter("default")
    for _ in range(2):
        assert_steps(fused, plain, X)
    assert len(groups_of(fused)) == 1
    for model in (fused, plain):
        if when == "between steps":
            change(model)
        else:
            model.base_model.model.between = lambda x, model=model: (change(model), x)[1]
    for _ in range(3):
        actual, expected = step(fused, X), step(plain, X)
        for name, value in expected.items():
            if value is not None:
                assert relative_error(actual[name], value) <= 1e-10, name


def test_the_group_goes_on_with_another_adapter():
    """It is of layers: what they compute is asked of each in every forward."""
    fused, plain = block()
    for model in (fused, plain):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second", "third"]))
    plain.load_state_dict(fused.state_dict())
    for _ in range(2):
        assert_steps(fused, plain, X)
    for model in (fused, plain):
        model.set_adapter("other")
    for _ in range(2):
        assert_steps(fused, plain, X)
    assert len(groups_of(fused)) == 1 and not shared_input._given_up
