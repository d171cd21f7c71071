"""Tiny models of any class of transformers, for test_decoder_layers, test_direction and test_forward_arguments."""

import torch
import transformers
from torch import nn

import gci_kernels
from gci_kernels import ALoRAConfig

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
IDS = torch.tensor([[5, 17, 52, 3, 41, 9, 27], [7, 8, 2, 42, 8, 30, 21]])


def made(name: str, **config) -> nn.Module:
    """A model in evaluation mode, the same at every call."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**config)).eval()


def alora(model: nn.Module, target: str = "q_proj") -> nn.Module:
    return gci_kernels.patch(model, ALoRAConfig(r=4, num_heads=2, target_modules=[target], init_weights=False)).eval()
