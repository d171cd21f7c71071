"""A base weight that somebody changes while an adapter is merged into it: the change stays, as in PEFT."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from gci_kernels import LoKIConfig, patch, unpatch

METHODS = ("lora", "loki")


def patched(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12))
    if method == "lora":
        return patch(get_peft_model(model, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)))
    return patch(model, LoKIConfig(positions={"0": [1, 5, 9]}, init_weights=False))


def weight(model):
    return model.base_model.model[0].base_layer.weight


def add(model):
    weight(model).data.add_(1.0)


def add_in_place(model):
    with torch.no_grad():
        weight(model).add_(1.0)


def load(model):
    layer = model.base_model.model[0].base_layer
    layer.load_state_dict({name: value + 1.0 for name, value in layer.state_dict().items()})


def replace(model):
    layer = model.base_model.model[0].base_layer
    layer.weight = nn.Parameter(layer.weight.detach() + 1.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", (add, add_in_place, load, replace))
def test_a_change_meanwhile_stays(method, change):
    model = patched(method)
    before = weight(model).detach().clone()
    model.merge_adapter()
    change(model)
    model.unmerge_adapter()
    torch.testing.assert_close(weight(model).detach(), before + 1.0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_nobody_changed_has_its_own_bits_again(method):
    model = patched(method)
    before = weight(model).detach().clone()
    for _ in range(2):
        model.merge_adapter()
        assert not torch.equal(weight(model), before)
        copy.deepcopy(model).unmerge_adapter()
        model.unmerge_adapter()
        assert torch.equal(weight(model), before)


def test_unpatching_keeps_a_change_made_while_merged():
    model = nn.Sequential(nn.Linear(16, 12))
    before = model[0].weight.detach().clone()
    peft_model = patch(model, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    peft_model.merge_adapter()
    add(peft_model)
    torch.testing.assert_close(unpatch(peft_model)[0].weight.detach(), before + 1.0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_change_of_the_bias_stays(method):
    model = patched(method)
    bias = model.base_model.model[0].base_layer.bias
    before = bias.detach().clone()
    model.merge_adapter()
    bias.data.add_(1.0)
    model.unmerge_adapter()
    torch.testing.assert_close(bias.detach(), before + 1.0, atol=1e-5, rtol=0)
