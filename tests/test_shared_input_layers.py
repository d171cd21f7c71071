"""Layers that are given the same tensor: which become groups, when these fall apart, and what stays as it is."""

import copy
import gc
import pickle
import weakref
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy_lora import IDS, Fingerprint, assert_same, lora_config, run, tiny_llama
from toy_methods import HydraLoRAConfig

import gci_kernels
from gci_kernels.accuracy import relative_error
from gci_kernels.ops.bottleneck import stages
from gci_kernels.tuners import shared_input

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "lora": lambda: lora_config(target_modules=ALL),
    "loramoe": lambda: gci_kernels.LoRAMoEConfig(r=2, num_experts=4, init_weights=False, target_modules=ALL),
    "hydralora": lambda: HydraLoRAConfig(r=4, init_weights=False, target_modules=ALL),
    "alora": lambda: gci_kernels.ALoRAConfig(r=4, num_heads=2, init_weights=False, target_modules=ALL),
}


@pytest.fixture(autouse=True)
def no_groups():
    """Every test begins and ends without groups, and with nothing that waits."""
    gc.collect()
    for each in (shared_input._groups, shared_input._found, shared_input._given_up, shared_input._tokens):
        each.clear()
    assert not shared_input._running
    yield
    assert not shared_input._running and shared_input._thread.state.waiting is None
    assert shared_input._thread.state.forward is None


def groups_of(model):
    """The names of the layers in each group, in order."""
    names = {id(module): name.rpartition("layers.")[2] for name, module in model.named_modules()}
    found = {id(group): group for group in shared_input._groups.values() if not group.given_up}.values()
    return sorted([names[id(layer())] for layer in group.layers] for group in found if id(group.layers[0]()) in names)


def expected_groups(*numbers):
    found = []
    for number in numbers:
        found.append([f"{number}.mlp.{name}_proj" for name in ("gate", "up")])
        found.append([f"{number}.self_attn.{name}_proj" for name in "qkv"])
    return sorted(found)


def patched(method="lora", **options):
    torch.manual_seed(1)
    model = tiny_llama()
    return gci_kernels.patch(model, CONFIGS[method](), **options).eval()


class Block(nn.Module):
    """Three projections of one tensor; `between` runs between the first and the others, and may give them another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(12, 10), nn.Linear(12, 7), nn.Linear(12, 9)
        self.between = lambda x: x
        self.region = lambda function, *args: function(*args)
        self.double()

    def forward(self, x):
        x = x * 1
        return self.region(self.project, x)

    def project(self, x):
        y = self.first(x)
        x = self.between(x)
        return torch.cat((y, self.second(x), self.third(x)), dim=-1).sin()


def block():
    """A patched block with LoRA, and the same with PEFT's own forward."""
    config = LoraConfig(r=3, target_modules=["first", "second", "third"], init_lora_weights=False)
    model = get_peft_model(Block(), config)
    return gci_kernels.patch(copy.deepcopy(model)), model


def step(model, x, loss=lambda y: y.square().sum()):
    """The output and the gradients of x and of the adapters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    loss(y).backward()
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def assert_steps(fused, plain, x, **how):
    actual, expected = step(fused, x, **how), step(plain, x, **how)
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= 1e-10, name


X = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


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
    assert len(groups_of(fused)) == 1


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
    layers.project = lambda x: layers.first(x)
    waiting = []
    hook = layers.first.register_forward_hook(
        lambda *_: waiting.append(weakref.ref(next(iter(shared_input._thread.state.waiting.ready.values())).made[0]))
    )
    y = fused(X)
    assert waiting[0]() is None and shared_input._thread.state.waiting is None
    y.sum().backward()
    hook.remove()
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
