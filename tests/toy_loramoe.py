"""A tiny Llama with LoRAMoE, its restatement in plain modules, and a batch of two tasks."""

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gci_kernels import LoRAMoEConfig
from gci_kernels.accuracy import relative_error
from gci_kernels.tuners import LoRAMoELinear

DELTA, WEIGHT = 0.3, 0.7
IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 77], [1, 1, 1, 62, 8, 30, 21], [1, 44, 2, 96, 55, 13, 70]])
# Padding is token 1, whose embedding is zero: the gates of the first layer tie there.
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])
TASKS = torch.tensor([1, 0, 0])
LABELS = IDS.masked_fill(MASK == 0, -100)
TRAINING_BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, "task_types": TASKS}


def tiny_llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    """The same model at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def moe_config(**overrides) -> LoRAMoEConfig:
    """Small, with an effect (B is random), and with uneven sizes."""
    return LoRAMoEConfig(**{"r": 3, "num_experts": 4, "lora_alpha": 6, "init_weights": False, **overrides})


def balanced_config(**overrides) -> LoRAMoEConfig:
    return moe_config(**{"balance_weight": WEIGHT, "balance_delta": DELTA, **overrides})


def adapted(config: LoRAMoEConfig | None = None, dtype: torch.dtype = torch.float64) -> PeftModel:
    """A tiny Llama with LoRAMoE, in training mode."""
    model = tiny_llama(dtype)
    torch.manual_seed(1)
    return get_peft_model(model, config or moe_config()).train()


def moe_layers(model: nn.Module) -> dict[str, LoRAMoELinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRAMoELinear)}


class RestatedLoRAMoE(nn.Module):
    """The sentence of the method, expert by expert, with copies of the adapters' weights; it remembers its gates."""

    def __init__(self, base: nn.Module, layer: LoRAMoELinear, configs: dict[str, LoRAMoEConfig]) -> None:
        super().__init__()
        self.base, self.gates = base, {}
        self.configs = {name: config for name, config in configs.items() if name in layer.loramoe_A}
        for part in ("loramoe_A", "loramoe_lora_B", "loramoe_router"):
            copies = {name: nn.Parameter(getattr(layer, part)[name].detach().clone()) for name in self.configs}
            setattr(self, part, nn.ParameterDict(copies))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        for name, config in self.configs.items():
            experts, top_k, scaling = config.num_experts, config.top_k, config.lora_alpha / config.r
            scores = torch.exp(x @ self.loramoe_router[name].T)
            gates = scores / scores.sum(-1, keepdim=True)
            if top_k is not None:
                kept = gates.sort(stable=True, dim=-1, descending=True).indices[..., :top_k]
                gates = gates * torch.zeros_like(gates).scatter(-1, kept, 1)
                gates = gates / gates.sum(-1, keepdim=True)
            self.gates[name] = gates
            As, Bs = self.loramoe_A[name].chunk(experts, 0), self.loramoe_lora_B[name].chunk(experts, 1)
            for n in range(experts):
                y = y + scaling * gates[..., n : n + 1] * (x @ As[n].T @ Bs[n].T)
        return y


def restated(plain: nn.Module, model: PeftModel, names: list[str] | None = None) -> nn.Module:
    """`plain` with the restatement in the place of every LoRAMoE layer of `model`, frozen but for the adapters."""
    plain.requires_grad_(False)
    for name, layer in moe_layers(model.get_base_model()).items():
        configs = {adapter: model.peft_config[adapter] for adapter in names or ["default"]}
        plain.set_submodule(name, RestatedLoRAMoE(plain.get_submodule(name), layer, configs))
    return plain.train(model.training)


def restated_balance(model: nn.Module, *, include_padding: bool = False) -> torch.Tensor:
    """Sum over layers and adapters of weight * var(Z) / mean(Z)^2, one sample and one expert at a time."""
    total = 0.0
    for layer in model.modules():
        for gates in layer.gates.values() if isinstance(layer, RestatedLoRAMoE) else ():
            experts, z = gates.shape[-1], []
            for b, task in enumerate(TASKS.tolist()):
                for n in range(experts):
                    counted = [t for t in range(IDS.shape[1]) if include_padding or MASK[b, t]]
                    mass = sum(gates[b, t, n] for t in counted)
                    favoured = (n < experts // 2) == (task == 1)
                    z.append(mass * (1 + DELTA if favoured else 1 - DELTA))
            z = torch.stack(z)
            variance = ((z - z.mean()) ** 2).sum() / (len(z) - 1)
            total = total + WEIGHT * variance / (z.mean() ** 2 + 1e-10)
    return total


def adapter_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of the parameters that train, under their names in the plain model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {name: parameter.grad for name, parameter in base.named_parameters() if parameter.requires_grad}


def assert_same_gradients(actual: nn.Module, expected: nn.Module, tolerance: float = 1e-10) -> None:
    actual, expected = adapter_gradients(actual), adapter_gradients(expected)
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert all(expected[name].any() for name in expected)
    assert max(errors.values()) < tolerance, errors


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits
