"""A patch that fails, or is interrupted, leaves the model exactly as it was."""

import importlib

import pytest
import torch
from peft import IA3Config, get_peft_model
from peft.tuners import lora
from torch import nn
from toy_lora import TARGETS, Fingerprint, logits, lora_config, tiny_llama, with_lora
from transformers import LlamaForCausalLM

from gci_kernels import LoRAMoEConfig, patch
from gci_kernels.accuracy import relative_error
from gci_kernels.tuners import FusedLoraLinear, LoRAMoELinear

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (LoRAMoEConfig(target_modules=["gate_proj", "norm"]), TypeError, "target_modules: model.norm is a LlamaRMS"),
        (LoRAMoEConfig(target_modules=["embed_tokens", "up_proj"]), TypeError, "target_modules.*Embedding"),
        (lora_config(target_modules=["gate_proj", "norm"]), ValueError, "LlamaRMSNorm"),
        (LoRAMoEConfig(target_modules=["gate_proj", "fc"]), ValueError, r"target_modules.*\['fc'\].*'gate_proj'"),
        (lora_config(target_modules=["c_attn", "fc"]), ValueError, r"target_modules.*\['c_attn', 'fc'\].*'q_proj'"),
        (LoRAMoEConfig(target_modules="nothing.*"), ValueError, "(?i)target.modules"),
        (lora_config(use_dora=True), ValueError, "Dora"),
        (lora_config(modules_to_save=["lm_head"], use_dora=True), ValueError, "Dora"),
        (IA3Config(target_modules=["up_proj"], feedforward_modules=[]), TypeError, "^config must be .*got IA3Config"),
        (
            {"r": 4},
            TypeError,
            "^config must be a (?=.*LoRAMoEConfig)(?=.*ALoRAConfig)(?=.*LoKIConfig).* or peft.LoraConfig, got dict",
        ),
    ],
    ids=["norm", "embedding", "lora-norm", "name", "names", "pattern", "dora", "dora-save", "method", "dict"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_failed_patch_leaves_the_model_as_it_was(config, error, message, checkpointing):
    model = tiny_llama()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.lm_head.requires_grad_(False)
    model.model.norm.register_forward_hook(lambda *_: None)
    before, expected = Fingerprint(model), logits(model)
    with pytest.raises(error, match=message):
        patch(model, config)
    before.assert_equal(Fingerprint(model))
    assert torch.equal(logits(model), expected)
    assert relative_error(logits(patch(model, lora_config())), expected) > 1e-2


@pytest.mark.parametrize("interrupt", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("config", "layer"),
    [(lora_config(), lora.Linear), (LoRAMoEConfig(target_modules=TARGETS), LoRAMoELinear)],
    ids=["LoRA", "LoRAMoE"],
)
def test_patch_interrupted_in_the_third_layer(config, layer, interrupt, monkeypatch):
    made, original = [], layer.update_layer

    def update_layer(self, *args, **kwargs):
        made.append(self)
        if len(made) == 3:
            raise interrupt("third layer")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(layer, "update_layer", update_layer)
    model = tiny_llama()
    before = Fingerprint(model)
    with pytest.raises(interrupt, match="third layer"):
        patch(model, config)
    assert len(made) == 3
    before.assert_equal(Fingerprint(model))


def test_fusing_interrupted_in_the_third_layer(monkeypatch):
    module = importlib.import_module("gci_kernels.patching.patch")
    model = with_lora()
    before, original = Fingerprint(model), module.is_plain_lora

    def is_plain_lora(layer):
        if sum(type(each) is FusedLoraLinear for each in model.modules()) == 3:
            raise RuntimeError("third layer")
        return original(layer)

    monkeypatch.setattr(module, "is_plain_lora", is_plain_lora)
    with pytest.raises(RuntimeError, match="third layer"):
        patch(model)
    before.assert_equal(Fingerprint(model))


def test_handles_still_remove_their_hooks_after_a_failed_patch():
    model = tiny_llama()
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="Dora"):
        patch(model, lora_config(use_dora=True))
    handle.remove()
    assert not model.model.norm._forward_hooks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_llama, "nothing to patch: looked for linear layers of peft.*no adapter layers at all.*config"),
        (lambda: nn.Linear(2, 2), "nothing to patch"),
        (
            lambda: get_peft_model(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
            "nothing to patch.*q_proj: ia3.layer.Linear has no fused form",
        ),
    ],
    ids=["plain", "linear", "IA3"],
)
def test_nothing_to_patch(make, message):
    model = make()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        patch(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("model", ["SmolLM2", None, LlamaForCausalLM], ids=["path", "None", "class"])
def test_model_must_be_a_module(model):
    with pytest.raises(TypeError, match="^model must be a torch.nn.Module, got"):
        patch(model)


def test_config_for_a_model_that_has_adapters():
    model = with_lora()
    before = Fingerprint(model)
    with pytest.raises(ValueError, match="PeftModel already.*add_adapter"):
        patch(model, lora_config())
    before.assert_equal(Fingerprint(model))
