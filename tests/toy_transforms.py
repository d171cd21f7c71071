"""A tiny Llama and a net of one layer with every method, for tests of what traces or transforms a patched model."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from toy_methods import HydraLoRAConfig
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from gci_kernels import ALoRAConfig, LoKIConfig, LoRAMoEConfig, patch

TARGETS = ["q_proj", "down_proj"]
METHODS = ("lora", "loramoe", "alora", "hydralora", "loki", "loki*")
#: Those whose layers need no sequence.
ALONE = ("lora", "loramoe", "hydralora", "loki", "loki*")
MOE = dict(r=2, num_experts=4, top_k=2, init_weights=False)


def config(method: str, targets: list[str], positions, dropout: float = 0.0):
    if method == "lora":
        return LoraConfig(r=3, target_modules=targets, init_lora_weights=False, lora_dropout=dropout)
    if method == "loramoe":
        return LoRAMoEConfig(**MOE, target_modules=targets, lora_dropout=dropout)
    if method == "hydralora":
        return HydraLoRAConfig(r=2, target_modules=targets, init_weights=False, lora_dropout=dropout)
    if method == "alora":
        return ALoRAConfig(r=4, num_heads=2, target_modules=targets, init_weights=False, lora_dropout=dropout)
    return LoKIConfig(positions=positions, r=2 if method == "loki*" else None, init_weights=False)


def llama(method: str, dtype=torch.float32, dropout: float = 0.0, attention: str = "sdpa", **options):
    """A patched Llama in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    settings = LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.2, attn_implementation=attention)
    model = LlamaForCausalLM(settings)
    torch.manual_seed(1)
    return patch(model, config(method, TARGETS, [[1, 5, 9], [0, 3]], dropout), **options).to(dtype).eval()


def with_biases(method: str, **options):
    """Qwen2, whose q_proj has a bias, which LoRA has too here."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, initializer_range=0.2))
    torch.manual_seed(1)
    if method == "lora":
        config = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False, lora_bias=True)
    else:
        rank = 2 if method == "loki*" else None
        config = LoKIConfig(positions=[[1, 5, 9]], target_modules=["q_proj"], r=rank, init_weights=False)
    model = patch(model, config, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.fc(x)))


def net(method: str, dtype=torch.float64, dropout: float = 0.0, **options):
    """A patched net for x [..., 8] in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    plain = Net()
    if method == "lora":  # PEFT's layer, swapped in place
        return patch(get_peft_model(plain, config(method, ["fc"], None, dropout)), **options).to(dtype).eval()
    return patch(plain, config(method, ["fc"], {"fc": [1, 4]}, dropout), **options).to(dtype).eval()


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def ids(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(97, (batch, time), generator=torch.Generator().manual_seed(seed))
