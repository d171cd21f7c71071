"""A tiny Llama with an adapter of any method, and the folder that it is saved in."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from toy_methods import HydraLoRAConfig
from transformers import LlamaConfig, LlamaForCausalLM

from gci_kernels import ALoRAConfig, LoKIConfig, LoRAMoEConfig, patch

IDS = torch.tensor([[5, 17, 80, 3, 41], [8, 2, 36, 62, 8]])
CONFIGS = {
    "lora": lambda **changes: LoraConfig(**dict(r=4, target_modules=["q_proj"], init_lora_weights=False) | changes),
    "loramoe": lambda **changes: LoRAMoEConfig(**dict(r=2, num_experts=4, init_weights=False) | changes),
    "alora": lambda **changes: ALoRAConfig(**dict(r=4, num_heads=2, init_weights=False) | changes),
    "hydralora": lambda **changes: HydraLoRAConfig(**dict(r=2, num_experts=3, init_weights=False) | changes),
    "loki": lambda **changes: LoKIConfig(**dict(positions=[[1, 5, 9], [0, 3]], init_weights=False) | changes),
    "loki*": lambda **changes: LoKIConfig(**dict(positions=[[1, 5, 9], [0, 3]], r=2, init_weights=False) | changes),
}
OURS = [name for name in CONFIGS if name != "lora"]
each_method = pytest.mark.parametrize("method", CONFIGS)
each_of_ours = pytest.mark.parametrize("method", OURS)


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


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
