"""A tiny Llama to be patched with each method, and all of it that unpatch has to restore."""

import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gci_kernels import ALoRAConfig, LoKIConfig, LoRAMoEConfig

IDS = torch.tensor([[5, 17, 80, 3, 41], [1, 44, 2, 96, 55]])

METHODS = ["lora", "loramoe", "alora", "loki"]


def llama(**changes) -> LlamaForCausalLM:
    """The same model at every call."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def config_of(method: str, target: str = "up_proj", **changes):
    if method == "lora":
        return LoraConfig(**{"r": 4, "target_modules": [target], "init_lora_weights": False, **changes})
    if method == "loramoe":
        return LoRAMoEConfig(**{"r": 2, "num_experts": 4, "target_modules": [target], "init_weights": False, **changes})
    if method == "alora":
        return ALoRAConfig(**{"r": 4, "num_heads": 2, "target_modules": [target], "init_weights": False, **changes})
    positions = {f"{layer}.{'self_attn' if target == 'q_proj' else 'mlp'}.{target}": [1, 5, 9] for layer in (0, 1)}
    return LoKIConfig(**{"positions": positions, "init_weights": False, **changes})


class Plain:
    """All of a plain model that unpatch has to give back."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
        self.parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
        self.modules = {name: (id(m), type(m), m.training) for name, m in model.named_modules()}
        self.hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
        self.config = model.config.to_dict() if isinstance(model, PreTrainedModel) else None

    def assert_is(self, model: nn.Module) -> None:
        other = Plain(model)
        assert other.modules == self.modules and other.parameters == self.parameters
        assert other.flags == self.flags and other.hooks == self.hooks and other.config == self.config
        assert other.tensors.keys() == self.tensors.keys()
        for name, tensor in self.tensors.items():
            assert torch.equal(other.tensors[name], tensor), name


def train(model: nn.Module) -> None:
    """One step of everything that is trained."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
