"""A tiny Llama with each method, and how it is asked to generate; for tests of layers that decode."""

import torch
from peft import LoraConfig
from toy_methods import HydraLoRAConfig
from transformers import LlamaConfig, LlamaForCausalLM

from gci_kernels import ALoRAConfig, LoKIConfig, LoRAMoEConfig, patch

METHODS = ("lora", "loramoe", "alora")
TARGETS = ["gate_proj", "down_proj", "q_proj"]
IDS = torch.tensor([[5, 17, 80, 3, 41], [8, 2, 36, 62, 8]])


def tiny_llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def config(method, **changes):
    if method == "alora":
        return ALoRAConfig(**dict(r=8, num_heads=2, target_modules=TARGETS, init_weights=False) | changes)
    if method == "hydralora":
        return HydraLoRAConfig(**dict(r=4, target_modules=TARGETS, init_weights=False) | changes)
    if method == "lora":
        return LoraConfig(**dict(r=4, target_modules=TARGETS, init_lora_weights=False) | changes)
    if method == "loki":
        return LoKIConfig(positions=[[3, 9, 40]] * 2, **changes)
    return LoRAMoEConfig(**dict(r=4, num_experts=4, target_modules=TARGETS, init_weights=False) | changes)


def adapted(method, dtype=torch.float32, **changes):
    torch.manual_seed(1)
    return patch(tiny_llama(dtype), config(method, **changes)).eval()


def settings(ids, **changes):
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False) | changes
