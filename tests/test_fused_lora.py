"""PEFT's LoRA layers after patch: they compute what PEFT's do, whatever their settings and their state."""

import copy
import importlib
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from toy_lora import (
    IDS,
    MASK,
    TARGETS,
    Fingerprint,
    adapted_layers,
    assert_same,
    logits,
    lora_config,
    patched_and_not,
    run,
    tiny_llama,
    with_lora,
    with_two_adapters,
)
from transformers import GPT2Config, GPT2LMHeadModel

from gci_kernels import patch, report, unpatch
from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.tuners import FusedLoraLinear

pytestmark = pytest.mark.usefixtures("one_thread")


# What a LoRA may be made of; every one of these runs fused.
FUSED_LORA = {
    "plain": {},
    "bias='lora_only'": {"bias": "lora_only"},
    "bias='all'": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.fixture
def fused_calls(monkeypatch) -> list[dict]:
    """The arguments of every call of the fused op by a patched layer."""
    module = importlib.import_module("gci_kernels.tuners.lora")
    calls, original = [], module.adapted_linear

    def spy(*args):
        calls.append(dict(zip(("operands", "mixer", "numbers", "scaling", "dropout_p", "impl"), args[:6], strict=True)))
        return original(*args)

    monkeypatch.setattr(module, "adapted_linear", spy)
    return calls


# PEFT's LoRA, layer for layer


@pytest.mark.smoke
@pytest.mark.parametrize("kind", FUSED_LORA)
def test_output_and_gradients_are_those_of_peft(kind, fused_calls):
    patched, peft = patched_and_not(with_lora(lora_config(**FUSED_LORA[kind])))
    training = kind != "dropout"  # random in training: it has tests of its own
    assert_same(patched.train(training), peft.train(training))
    assert len(fused_calls) == len(adapted_layers(patched)) == 6


def test_conv1d_base(fused_calls):
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=97, n_positions=16)).double()
    config = lora_config(target_modules=["c_fc", "c_attn"], fan_in_fan_out=True)
    patched, peft = patched_and_not(get_peft_model(plain, config).eval())
    assert_same(patched, peft)
    assert len(fused_calls) == 4


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "autocast"),
    [
        (torch.float32, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float32, torch.float32, True),
    ],
)
def test_error_is_at_most_twice_that_of_peft(dtype, adapter_dtype, autocast, fused_calls):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(72, 88)), lora_config(target_modules=["0"], lora_bias=True))
    layer = model.base_model.model[0]
    layer.base_layer.to(dtype)
    layer.lora_A.to(adapter_dtype)
    layer.lora_B.to(adapter_dtype)
    working = torch.bfloat16 if autocast else dtype
    x, dout = torch.randn(2, 65, 72).to(dtype), torch.randn(2, 65, 88).to(working)

    def results(model: nn.Module, x: torch.Tensor, dout: torch.Tensor, autocast: bool = autocast) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = model(x)
        y.backward(dout)
        return [y, x.grad, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]

    exact = results(copy.deepcopy(model).double(), x.double(), dout.double(), autocast=False)
    plain = results(copy.deepcopy(model), x, dout)
    fused = results(patch(model), x, dout)
    assert len(exact) == 5 and len(fused_calls) == 1
    for ours, theirs, true in zip(fused, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, true) <= error_bound(relative_error(theirs, true), working)


@pytest.fixture
def dropout_layer() -> lora.Linear:
    """A patched layer of 64 features in training whose output is dropout(x), p = 0.25."""
    config = lora_config(r=64, lora_alpha=64, lora_dropout=0.25, target_modules=["0"])
    layer = patch(get_peft_model(nn.Sequential(nn.Linear(64, 64, bias=False)), config)).base_model.model[0]
    nn.init.zeros_(layer.base_layer.weight)
    nn.init.eye_(layer.lora_A["default"].weight)
    nn.init.eye_(layer.lora_B["default"].weight)
    return layer.train()


def test_dropout_drops_with_its_probability_and_the_same_in_backward(dropout_layer, fused_calls):
    x = torch.ones(500, 64, requires_grad=True)
    y = dropout_layer(x)
    y.sum().backward()
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.75))
    # 32,000 draws: five standard deviations are 0.012; neither rows nor columns repeat one another
    assert abs(kept.float().mean() - 0.75) < 0.012
    assert len(kept.unique(dim=0)) == 500 and len(kept.unique(dim=1)[0]) == 64
    torch.testing.assert_close(x.grad, y.detach())
    torch.testing.assert_close(dropout_layer.lora_A["default"].weight.grad, y.detach().sum(0).expand(64, 64))
    assert fused_calls[0]["dropout_p"] == 0.25


def test_dropout_follows_the_seed_of_torch(dropout_layer):
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return dropout_layer(torch.ones(4, 64))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    torch.manual_seed(0)
    assert not torch.equal(dropout_layer(torch.ones(4, 64)), dropout_layer(torch.ones(4, 64)))


def test_dropout_follows_the_mode_of_its_own_module(dropout_layer):
    dropout_layer.lora_dropout.eval()
    torch.testing.assert_close(dropout_layer(torch.ones(4, 64)), torch.ones(4, 64))


# Several adapters, merged, disabled, mixed


@pytest.mark.parametrize("names", [["default"], ["other"], ["default", "other"], ["other", "default"]], ids="+".join)
def test_active_adapters(names, fused_calls):
    patched, peft = patched_and_not(with_two_adapters(lora_bias=True))
    for model in (patched, peft):
        model.base_model.set_adapter(names)
    assert_same(patched, peft)
    assert len(fused_calls) == 2 * sum({"default": 3, "other": 2}[name] for name in names)


def test_scaling_follows_peft():
    patched, peft = patched_and_not(with_lora())
    before = logits(patched)
    for model in (patched, peft):
        for layer in adapted_layers(model).values():
            layer.set_scale("default", 0.5)
    assert_same(patched, peft)
    assert relative_error(logits(patched), before) > 1e-3


@pytest.mark.parametrize("patch_first", [True, False])
def test_merged_then_unmerged(patch_first, fused_calls):
    patched, peft = with_lora(), with_lora()
    if patch_first:
        patch(patched)
    patched.merge_adapter()
    if not patch_first:
        patch(patched)
    peft.merge_adapter()
    assert torch.equal(logits(patched), logits(peft))
    assert not fused_calls
    assert all(row.plan.endswith("merged)") for row in report(patched))
    for model in (patched, peft):
        model.unmerge_adapter()
    assert_same(patched, peft)
    assert len(fused_calls) == 6
    assert_same(patched, with_lora())


@pytest.mark.smoke
def test_merge_and_unload():
    patched, peft = patched_and_not(with_lora())
    merged = [model.merge_and_unload() for model in (patched, peft)]
    assert not adapted_layers(merged[0])
    assert torch.equal(*map(logits, merged))


def test_disabled_adapters_give_the_base_model_exactly(fused_calls):
    patched, peft = patched_and_not(with_lora())
    with patched.disable_adapter():
        assert torch.equal(logits(patched), logits(tiny_llama()))
        assert not fused_calls
        assert all("disabled" in row.plan for row in report(patched))
    assert_same(patched, peft)


def test_patch_while_disabled(fused_calls):
    patched, peft = with_lora(), with_lora()
    with patched.disable_adapter():
        patch(patched)
        assert torch.equal(logits(patched), logits(tiny_llama()))
    assert_same(patched, peft)
    assert len(fused_calls) == 6


def test_mixed_batch():
    patched, peft = patched_and_not(with_two_adapters())
    names = ["default", "__base__", "other"]
    assert_same(patched, peft, adapter_names=names)
    assert relative_error(run(patched, adapter_names=names)[0], logits(patched)) > 1e-2


def test_modules_of_an_adapter_added_later(fused_calls):
    patched, peft = patch(with_lora()), with_two_adapters()
    torch.manual_seed(3)
    patched.add_adapter("other", copy.deepcopy(peft.peft_config["other"]))
    theirs = peft.state_dict()
    assert patched.state_dict().keys() == theirs.keys()
    patched.load_state_dict(theirs)
    patched.eval()
    for model in (patched, peft):
        model.base_model.set_adapter(["default", "other"])
    assert_same(patched, peft)
    new = {row.name: row for row in report(patched) if "up_proj" in row.name}
    assert len(new) == 2 and all("not patched" in row.declined for row in new.values())
    assert len(fused_calls) == 8
    patch(patched)
    assert_same(patched, peft)
    assert len(fused_calls) == 8 + 10
    assert not any(row.declined for row in report(patched))


@pytest.mark.parametrize("adapter_names", [None, ["default", "other", "__base__"]], ids=["active", "mixed"])
def test_generates_the_same_tokens_as_peft(adapter_names):
    patched, peft = patched_and_not(with_two_adapters().float())
    settings = {"attention_mask": MASK, "max_new_tokens": 10, "do_sample": False}
    if adapter_names is not None:
        settings["adapter_names"] = adapter_names
    tokens = [model.generate(input_ids=IDS, **settings) for model in (patched, peft)]
    assert tokens[0].shape == (3, 17)
    assert torch.equal(tokens[0], tokens[1])


def test_hooks_keep_firing(fused_calls):
    patched, peft = patched_and_not(with_lora())
    fired = []
    for model in (patched, peft):
        layer = model.base_model.model.model.layers[0].mlp.gate_proj
        layer.base_layer.register_forward_hook(lambda module, args, output: fired.append("base") or 2 * output)
        layer.register_forward_pre_hook(lambda module, args: fired.append("layer"))
        layer = model.base_model.model.model.layers[1].mlp.gate_proj
        layer.lora_A["default"].register_forward_hook(lambda module, args, output: fired.append("A") or 3 * output)
    assert_same(patched, peft)
    assert fired == 2 * ["layer", "base", "A"]
    assert len(fused_calls) == 5
    (declined,) = (row for row in report(patched) if row.declined)
    assert declined.name.endswith("layers.1.mlp.gate_proj") and "hooks" in declined.declined


def test_forward_replaced_on_a_base_layer_is_called():
    patched, peft = patched_and_not(with_lora())
    for model in (patched, peft):
        base_layer = model.base_model.model.model.layers[0].mlp.gate_proj.base_layer
        base_layer.forward = lambda x, own=base_layer.forward: 2 * own(x)  # as accelerate does to move weights
    assert_same(patched, peft)
    assert relative_error(logits(patched), logits(with_lora())) > 1e-2


# DoRA


def test_dora_alone_is_refused():
    model = with_lora(lora_config(use_dora=True))
    before, expected = Fingerprint(model), logits(model)
    with pytest.raises(ValueError, match="nothing to patch.*Dora"):
        patch(model)
    before.assert_equal(Fingerprint(model))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("active", ["default", "other"])
def test_dora_beside_lora(active, fused_calls):
    model = with_two_adapters(use_dora=True, target_modules=TARGETS)
    model.base_model.set_adapter(active)
    patched, peft = patched_and_not(model)
    for names, calls in ((["other"], 0), (["default", "other"], 0), (["default"], 6)):
        for model in (patched, peft):
            model.base_model.set_adapter(names)
        assert_same(patched, peft)
        assert len(fused_calls) == calls
        reasons = [row.declined for row in report(patched)]
        if calls:
            assert reasons == 6 * [None]
        else:
            assert all("adapter 'other' uses DoraLinearVariant" in reason for reason in reasons)


# Copies and files


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_patched_model(duplicate, fused_calls):
    model = patch(with_lora())
    twin = duplicate(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert_same(twin, model, tolerance=0)
    assert len(fused_calls) == 12
    unpatch(twin)
    assert_same(twin, with_lora())
    assert FusedLoraLinear in {type(module) for module in model.modules()}


def test_saved_adapter_is_that_of_peft(tmp_path):
    model = patch(with_lora())
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).eval(), with_lora(), tolerance=0)
