"""A tiny Llama with PEFT's LoRA, and what makes sure that two models are the same: in numbers, or in all they are."""

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gci_kernels import patch
from gci_kernels.accuracy import relative_error
from gci_kernels.tuners import AdaptedLinear

TARGETS = ["gate_proj", "down_proj", "q_proj"]

IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 77], [1, 1, 1, 62, 8, 30, 21], [1, 44, 2, 96, 55, 13, 70]])

MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])


def tiny_llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    """The same model at every call, with biases in its linear layers, in evaluation mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=1, initializer_range=0.2,
        attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


def lora_config(**overrides) -> LoraConfig:
    """LoRA with an effect (B is random)."""
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False, **overrides})


def with_lora(config: LoraConfig | None = None, dtype: torch.dtype = torch.float64) -> PeftModel:
    """A tiny Llama with PEFT's LoRA, in evaluation mode; the same at every call with an equal config."""
    model = tiny_llama(dtype)
    torch.manual_seed(1)
    return get_peft_model(model, config or lora_config()).eval()


def with_two_adapters(**other) -> PeftModel:
    """Adapter "default", and "other" of another rank, scaling and targets; "default" is active."""
    model = with_lora()
    other = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], **other}
    model.add_adapter("other", lora_config(**other))
    return model.eval()


def patched_and_not(model: PeftModel) -> tuple[PeftModel, PeftModel]:
    """A patched copy, and the model itself."""
    return patch(copy.deepcopy(model)), model


def run(model: nn.Module, *, backward: bool = True, **kwargs) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """The logits, and the gradients of all parameters and of the input; dropout draws from the same seed."""
    torch.manual_seed(2)
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        logits = model(inputs_embeds=embedded, attention_mask=MASK, **kwargs).logits
    if not backward:
        return logits, {}
    model.zero_grad()
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits.detach(), {**gradients, "inputs_embeds": embedded.grad}


def assert_same(actual: nn.Module, expected: nn.Module, tolerance: float = 1e-10, **kwargs) -> None:
    """Equal logits and gradients; a parameter without a gradient has none in both."""
    (actual_logits, actual_gradients), (logits, gradients) = run(actual, **kwargs), run(expected, **kwargs)
    assert relative_error(actual_logits, logits) <= tolerance
    assert actual_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (actual_gradients[name] is None) == (gradient is None), name
        if gradient is not None:
            assert relative_error(actual_gradients[name], gradient) <= tolerance, name


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (lora.LoraLayer, AdaptedLinear))}


def logits(model: nn.Module) -> torch.Tensor:
    return run(model, backward=False)[0]


class Fingerprint:
    """All that makes up a model: modules, their classes and attributes, parameters and their values, hooks, configs.

    Objects count by identity; they are kept alive here, so that an address cannot be used twice.
    """

    def __init__(self, model: nn.Module) -> None:
        self._alive: list = []
        self.modules = {
            name: (id(module), type(module), {key: self._mark(value) for key, value in vars(module).items()})
            for name, module in model.named_modules(remove_duplicate=False)
        }
        self.values = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
        self.flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.configs = [getattr(model, name).to_dict() for name in ("config", "generation_config")]

    def _mark(self, value):
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        self._alive.append(value)
        if isinstance(value, dict):
            return [(self._mark(key), self._mark(each)) for key, each in value.items()]
        if isinstance(value, (list, tuple)):
            return [self._mark(each) for each in value]
        if isinstance(value, (set, frozenset)):
            return {id(each) if not isinstance(each, str) else each for each in value}
        return id(value)

    def assert_equal(self, other: "Fingerprint") -> None:
        assert self.modules.keys() == other.modules.keys()
        for name, (identity, cls, attributes) in self.modules.items():
            assert other.modules[name][:2] == (identity, cls), name
            assert other.modules[name][2] == attributes, name
        assert self.flags == other.flags
        assert self.configs == other.configs
        assert self.values.keys() == other.values.keys()
        assert all(torch.equal(value, other.values[name]) for name, value in self.values.items())
