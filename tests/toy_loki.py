"""Tiny models with LoKI, and a restatement of it with the rows written into the weight."""

import copy

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from gci_kernels import LoKIConfig
from gci_kernels.accuracy import relative_error
from gci_kernels.tuners import LoKILinear

IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 77], [8, 2, 36, 62, 8, 30, 21], [1, 44, 2, 96, 55, 13, 70]])

POSITIONS = [[31, 4, 17], [], [0, 5, 6, 7, 29]]

SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


def plain(family: str = "llama", dtype: torch.dtype = torch.float64, **changes) -> nn.Module:
    """The same model at every call; down_proj has a bias."""
    torch.manual_seed(0)
    if family == "llama":
        settings = SMALL | dict(num_key_value_heads=2, mlp_bias=True, initializer_range=0.2) | changes
        model = LlamaForCausalLM(LlamaConfig(**settings))
    elif family == "gpt_neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, initializer_range=0.2))
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=97, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2, resid_pdrop=0, attn_pdrop=0
            )
        )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def config(**changes) -> LoKIConfig:
    return LoKIConfig(**{"positions": POSITIONS, "init_weights": False, "lora_alpha": 3} | changes)


def adapted(family: str = "llama", dtype: torch.dtype = torch.float64, **changes) -> PeftModel:
    model = plain(family, dtype)
    torch.manual_seed(1)
    model = get_peft_model(model, config(**changes))
    for name, parameter in model.named_parameters():
        if "active_bias" in name:
            nn.init.normal_(parameter)
    return model.to(dtype).eval()


def loki_layers(model: nn.Module) -> dict[str, LoKILinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoKILinear)}


class RestatedLoKI(nn.Module):
    """Section 3 of the design: W and b with rows replaced, each time anew."""

    def __init__(self, layer: LoKILinear, names: list[str]) -> None:
        super().__init__()
        base = copy.deepcopy(layer.get_base_layer())
        self.weight = (base.weight.t() if isinstance(base, Conv1D) else base.weight).detach()
        self.bias = None if base.bias is None else base.bias.detach()
        self.names, self.scaling = names, layer.scaling
        self.positions = {name: layer.loki_positions[name] for name in layer.r}
        for part in layer.adapter_layer_names:
            setattr(self, part, copy.deepcopy(getattr(layer, part)))

    def forward(self, x):
        weight, bias = self.weight, self.bias
        for name in self.names:
            if name not in self.positions:
                continue
            rows = self.positions[name]
            if name in self.loki_active:
                weight = weight.index_put((rows,), self.loki_active[name])
            else:
                change = self.scaling[name] * self.loki_lora_B[name] @ self.loki_A[name]
                weight = weight.index_put((rows,), weight[rows] + change)
            if bias is not None:
                bias = bias.index_put((rows,), self.loki_active_bias[name])
        return F.linear(x, weight, bias)


def restated(model: PeftModel, names: tuple[str, ...] = ("default",)) -> nn.Module:
    twin = copy.deepcopy(model)
    for name, layer in loki_layers(twin).items():
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, RestatedLoKI(layer, list(names)))
    return twin


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(input_ids=IDS).logits
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return {"logits": out.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, expected: nn.Module, tolerance: float = 1e-12) -> None:
    actual, wanted = gradients(model), gradients(expected)
    assert actual.keys() == wanted.keys() and len(wanted) > 1
    for name, value in wanted.items():
        assert relative_error(actual[name], value) < tolerance, name
