"""Layers that are given the same tensor: when groups may change, and what stays as it is."""

import copy
import pickle
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy_lora import IDS, Fingerprint, assert_same, lora_config, run, tiny_llama
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
)

import gci_kernels
from gci_kernels.accuracy import relative_error
from gci_kernels.tuners import shared_input

pytestmark = pytest.mark.usefixtures("no_groups")


def reentrant(function, *args):
    return checkpoint(function, *args, use_reentrant=True)


def replayed(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


@pytest.mark.parametrize("region", [reentrant, replayed])
def test_checkpointing(region):
    fused, plain = block()
    fused.base_model.model.region = region
    for _ in range(4):
        assert_steps(fused, plain, X)
    assert len(groups_of(fused)) == (region is replayed)
    fused.base_model.model.region = lambda function, *args: function(*args)
    for _ in range(2):
        assert_steps(fused, plain, X)
    fused.base_model.model.region = region
    for _ in range(2):
        assert_steps(fused, plain, X)
    assert len(groups_of(fused)) == 1


@pytest.mark.parametrize("use_reentrant", (True, False))
def test_checkpointing_of_transformers(use_reentrant):
    model, reference = patched("loramoe"), patched("loramoe", impl="reference")
    reference.load_state_dict(model.state_dict())
    model.train(), reference.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for _ in range(3):
        assert_same(model, reference, use_cache=False)
    assert groups_of(model) == ([] if use_reentrant else expected_groups(0, 1))


@pytest.mark.parametrize("region", [reentrant, replayed])
def test_regions_of_single_layers_make_no_group(region):
    fused, plain = block()
    layers = fused.base_model.model
    layers.project = lambda x: torch.cat(
        [region(layer, x) for layer in (layers.first, layers.second, layers.third)], -1
    ).sin()
    for _ in range(4):
        assert_steps(fused, plain, X)
    assert groups_of(fused) == []


@pytest.mark.parametrize("region", [reentrant, replayed])
def test_forwards_before_the_first_backward(region):
    """As in DPO: the second forward begins while the first one waits, and both have to save what they saved."""
    fused, plain = block()
    fused.base_model.model.region = region
    for _ in range(3):
        found = []
        for model in (fused, plain):
            model.zero_grad()
            inputs = [X.clone().requires_grad_(), (X + 1).requires_grad_(), X.clone().requires_grad_()]
            chosen, rejected = model(inputs[0]), model(inputs[1])
            (chosen.sum() - rejected.square().sum()).backward()
            model(inputs[2]).sum().backward()
            found.append([each.grad for each in inputs] + [p.grad for p in model.parameters() if p.requires_grad])
        for actual, expected in zip(*found, strict=True):
            assert relative_error(actual, expected) <= 1e-10
    assert len(groups_of(fused)) == (region is replayed)


def test_groups_change_at_quiet_moments_only():
    fused, _ = block()
    fused.base_model.model.region = replayed
    first = fused(X.clone().requires_grad_())
    second = fused(X.clone().requires_grad_())
    third = fused(X.clone().requires_grad_())
    assert not shared_input._groups and shared_input._found
    (first.sum() + second.sum()).backward()
    fourth = fused(X.clone().requires_grad_())
    assert not shared_input._groups, "the third one waits"
    third.sum().backward(retain_graph=True)
    fourth.sum().backward()
    fifth = fused(X.clone().requires_grad_())
    assert not shared_input._groups, "the third one may run again"
    third.sum().backward()
    fifth.sum().backward()
    fused(X.clone().requires_grad_()).sum().backward()
    assert len(groups_of(fused)) == 1


def test_a_forward_without_backward_does_not_block():
    fused, plain = block()
    held = fused(X.clone().requires_grad_())  # without checkpointing nothing of it runs again
    for _ in range(2):
        assert_steps(fused, plain, X)
    assert len(groups_of(fused)) == 1
    held.sum().backward()
    shared_input._groups.clear()
    fused.base_model.model.region = replayed
    fused(X.clone().requires_grad_())  # dropped
    for _ in range(3):
        assert_steps(fused, plain, X)
    assert len(groups_of(fused)) == 1


def test_a_forward_that_raises():
    """What was computed ahead is dropped, and the group stays."""
    fused, plain = block()
    for _ in range(2):
        assert_steps(fused, plain, X)

    def fail(x):
        raise KeyError("between")

    fused.base_model.model.between = fail
    with pytest.raises(KeyError, match="between"):
        fused(X)
    assert shared_input._thread.state.waiting is None
    fused.base_model.model.between = lambda x: x
    for _ in range(2):
        assert_steps(fused, plain, X)
    assert len(groups_of(fused)) == 1


def test_a_layer_that_is_never_called_keeps_no_memory():
    fused, _ = block()
    for _ in range(2):
        fused(X).sum().backward()
    layers = fused.base_model.model
    waiting = []

    def project(x):
        y = layers.first(x)
        waiting.append(weakref.ref(next(iter(shared_input._thread.state.waiting.ready.values())).made[0]))
        return y

    layers.project = project
    y = fused(X)
    assert waiting[0]() is None and shared_input._thread.state.waiting is None
    y.sum().backward()
    layers.project = lambda x: layers.first(x)
    fused(X)
    assert groups_of(fused) == []


def test_layers_stay_as_they_are():
    """Groups are no part of a model: names, values, attributes, copies and pickles are those before training."""
    model = patched()
    run(model, use_cache=False)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    names = list(model.state_dict())
    run(model, use_cache=False)
    assert groups_of(model) == expected_groups(0, 1)
    assert before == {name: set(vars(module)) for name, module in model.named_modules()}
    assert names == list(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(twin, model, use_cache=False)
        for _ in range(2):
            run(twin, use_cache=False)
        assert_same(twin, model, use_cache=False)


def test_unpatch_after_training():
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), lora_config(target_modules=ALL)).eval()
    run(model)
    before = Fingerprint(model)
    gci_kernels.patch(model)
    for _ in range(3):
        run(model)
    assert groups_of(model) == expected_groups(0, 1)
    gci_kernels.unpatch(model)
    model.zero_grad()
    Fingerprint(model).assert_equal(before)
    run(model)
    gci_kernels.patch(model)
    run(model)
    assert groups_of(model) == expected_groups(0, 1)


def test_compiled_models_make_no_groups():
    model = patched()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        run(compiled, use_cache=False)
    assert not shared_input._groups and not shared_input._found
    for _ in range(2):
        run(model, use_cache=False)
    assert groups_of(model) == expected_groups(0, 1)
    assert relative_error(run(compiled, use_cache=False)[0], run(model, use_cache=False)[0]) <= 1e-10


def test_autocast_and_its_absence_between_calls():
    fused, plain = block()
    fused, plain = fused.float(), plain.float()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            y = fused(X.float())
        y.float().sum().backward()
    assert len(groups_of(fused)) == 1
    layers, seen = fused.base_model.model, []

    def project(x):
        y = layers.first(x)
        with torch.autocast("cpu", enabled=False):
            seen.append(layers.second(x))
        return y

    layers.project = project
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(X.float()).dtype == torch.bfloat16
    assert seen[0].dtype == torch.float32


@pytest.mark.parametrize("method", ["lora", "loramoe"])
def test_training_is_that_of_separate_layers(method, monkeypatch):
    """The loss curves are equal but for rounding."""
    curves = []
    for apart in (False, True):
        if apart:
            monkeypatch.setattr(shared_input, "_takes", lambda arguments, x: False)
        model = gci_kernels.patch(tiny_llama(), CONFIGS[method]())
        torch.manual_seed(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(12):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(torch.tensor(losses, dtype=torch.float64))
        assert groups_of(model) == expected_groups(0, 1)
    assert curves[0][-1] < curves[0][0] - 0.1
    assert relative_error(curves[0], curves[1]) <= 1e-9
