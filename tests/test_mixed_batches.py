"""Batches in which every sequence has an adapter of its own (adapter_names): what each would give alone."""

import copy

import pytest
import torch
from toy_decoding import IDS, METHODS, adapted, config, settings

from gci_kernels import LoKIConfig, patch
from gci_kernels.ops.decode import native
from gci_kernels.testing import relative_error

pytestmark = pytest.mark.usefixtures("poisoned")


NAMES = ["other", "__base__", "default", "other"]
BATCH = torch.cat((IDS, IDS.flip(1)))


def with_two(method):
    model = adapted(method)
    torch.manual_seed(2)
    if method == "lora":
        changes = {"r": 6}
    else:
        changes = {"alora": dict(r=12, num_heads=3, residual=True), "loramoe": dict(num_experts=2, top_k=1)}.get(
            method, {}
        )
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


@pytest.mark.parametrize("method", (*METHODS, "loki"))
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
