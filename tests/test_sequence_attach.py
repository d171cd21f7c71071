"""Attaching a model, so that its layers know of sequences, and detaching it: classes, copies, hooks, refusals."""

import copy
import functools
import inspect
import io
import pickle

import pytest
import torch
import toy_alora
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, T5Config, T5ForConditionalGeneration
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from gci_kernels.accuracy import relative_error
from gci_kernels.generation.sequence import attach

pytestmark = pytest.mark.usefixtures("one_thread")

attached, logits, plain = toy_alora.attached, toy_alora.logits, toy_alora.plain
toys, with_toys = toy_alora.toys, toy_alora.with_toys


def state(model: nn.Module) -> list:
    """Everything about the modules of a model but their parameters' values."""
    found = []
    for module in model.modules():
        values = {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
        found.append((module, type(module), values))
    return found


def test_detach_is_exact_and_attach_idempotent():
    model = with_toys(plain())
    before = state(model)
    first, second = attach(model), attach(model)
    assert type(model.model).__name__ == "LlamaModel"
    expected = logits(model)
    second.detach()
    for toy in toys(model):
        toy.calls = 0
    for (module, cls, values), (_, old_cls, old_values) in zip(state(model), before, strict=True):
        assert cls is old_cls and values.keys() == old_values.keys(), type(module)
        assert all(values[name] is old_values[name] or values[name] == old_values[name] for name in values)
    with pytest.raises(RuntimeError, match="sequence.attach"):
        logits(model)
    first.detach()
    attach(model)
    assert torch.equal(logits(model), expected)


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
def test_copies_are_attached_and_independent(duplicate):
    model = with_toys(plain())
    handle = attach(model)
    twin = duplicate(model)
    expected = logits(model)
    assert torch.equal(logits(twin), expected)
    handle.detach()
    assert torch.equal(logits(twin), expected)
    attach(twin).detach()
    assert type(twin.model) is type(model.model) and type(twin.model.layers[1]) is type(model.model.layers[1])


def test_class_keeps_its_name_and_signature():
    model, old = attached().model, plain().model
    for new, before in ((model, old), (model.layers[0], old.layers[0])):
        assert str(type(new)) == str(type(before)) and isinstance(new, type(before))
        assert inspect.signature(new.forward) == inspect.signature(before.forward)


def test_peft_model():
    model = with_toys(plain())
    handle = attach(model)
    expected = logits(model)
    handle.detach()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    attach(wrapped)
    assert torch.equal(logits(wrapped), expected)


@pytest.mark.parametrize("first", ["attach", "hooks"])
def test_accelerate_hooks(first):
    model = with_toys(plain())
    handle = attach(model)
    expected = logits(model)
    if first == "hooks":
        handle.detach()
    for module in (model, model.model, *model.model.layers):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    if first == "hooks":
        handle = attach(model)
    assert torch.equal(logits(model), expected)
    handle.detach()
    for toy in toys(model):
        toy.enabled = False
    assert relative_error(logits(model), logits(plain())) < 1e-12


def test_models_that_cannot_be_attached_are_refused_and_left_alone():
    with pytest.raises(TypeError, match="^model must be a PreTrainedModel.*Linear"):
        attach(nn.Linear(2, 2))
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="^model must be decoder-only.*T5"):
        attach(T5ForConditionalGeneration(config))
    model = plain()
    model.model.layers[1].forward = functools.partial(model.model.layers[1].forward)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="forward of a LlamaDecoderLayer is replaced"):
        attach(model)
    assert before == [type(module) for module in model.modules()]
    model = plain()
    model.model.others = nn.ModuleList([GPT2Block(GPT2Config(n_embd=8, n_head=2)) for _ in model.model.layers])
    with pytest.raises(ValueError, match="^model: .*LlamaForCausalLM.*layers.*others.*GPT2Block"):
        attach(model)


def test_no_detach_from_a_class_that_was_changed_since():
    model = with_toys(plain())
    handle = attach(model)
    layer = model.model.layers[1]
    mine = type(layer)
    layer.__class__ = type("Wrapped", (mine,), {})
    with pytest.raises(RuntimeError, match="Wrapped"):
        handle.detach()
    assert logits(model).isfinite().all()
    layer.__class__ = mine
    handle.detach()
    assert type(layer) is LlamaDecoderLayer
