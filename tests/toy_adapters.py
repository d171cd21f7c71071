"""A tiny Llama with an adapter of any method, the folder that it is saved in, and all of the plain model."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from toy_methods import HydraLoRAConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gci_kernels import ALoRAConfig, LoKIConfig, LoRAMoEConfig, patch

IDS = torch.tensor([[5, 17, 80, 3, 41], [8, 2, 36, 62, 8]])
SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.2,
)  # fmt: skip
CONFIGS = {
    "lora": lambda **changes: LoraConfig(**dict(r=4, target_modules=["q_proj"], init_lora_weights=False) | changes),
    "loramoe": lambda **changes: LoRAMoEConfig(**dict(r=2, num_experts=4, init_weights=False) | changes),
    "alora": lambda **changes: ALoRAConfig(**dict(r=4, num_heads=2, init_weights=False) | changes),
    "hydralora": lambda **changes: HydraLoRAConfig(**dict(r=2, num_experts=3, init_weights=False) | changes),
    "loki": lambda **changes: LoKIConfig(**dict(positions=[[1, 5, 9], [0, 3]], init_weights=False) | changes),
    "loki*": lambda **changes: LoKIConfig(**dict(positions=[[1, 5, 9], [0, 3]], r=2, init_weights=False) | changes),
}
METHODS = [name for name in CONFIGS if name != "loki*"]
OURS = [name for name in CONFIGS if name != "lora"]
each_method = pytest.mark.parametrize("method", CONFIGS)
each_of_ours = pytest.mark.parametrize("method", OURS)


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()


def adapted(method: str, **changes) -> PeftModel:
    model = llama()
    torch.manual_seed(1)
    return patch(model, CONFIGS[method](**changes)).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def saver(tmp_path):
    """Puts a base model there; what it returns saves adapters beside it: (method, **changes) -> (model, folder)."""
    llama().save_pretrained(tmp_path / "base")

    def saved(method: str, **changes):
        model = adapted(method, **changes)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / method)
        return model, tmp_path / method

    return saved


def config_of(method: str, target: str = "up_proj", **changes):
    """Of a method, for that projection of every layer."""
    if method.startswith("loki"):
        parent = "self_attn" if target == "q_proj" else "mlp"
        return CONFIGS[method](**{"positions": {f"{n}.{parent}.{target}": [1, 5, 9] for n in (0, 1)}} | changes)
    return CONFIGS[method](**{"target_modules": [target]} | changes)


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
