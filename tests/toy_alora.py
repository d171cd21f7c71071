"""Tiny models of many families, and a stand-in for an adapted layer that needs to know sequences and its past.

Loaded by test_sequence.py, test_sequence_attach.py and test_adapter_cache*.py.
"""

import zlib

import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from gci_kernels.generation import sequence

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 60,
}  # fmt: skip
GATED = {**SIZES, "intermediate_size": 40, "num_key_value_heads": 1, "head_dim": 16}
CONFIGS = {
    "llama": lambda: LlamaConfig(**GATED),
    "qwen2": lambda: Qwen2Config(**GATED),
    "qwen3": lambda: Qwen3Config(**GATED),
    "mistral": lambda: MistralConfig(**GATED, sliding_window=6),
    "gemma2": lambda: Gemma2Config(**GATED, sliding_window=6),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=40, hidden_dropout=0.0, attention_dropout=0.0),
    "phi": lambda: PhiConfig(**SIZES, intermediate_size=40, resid_pdrop=0.0),
    "gpt2": lambda: GPT2Config(**SIZES, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=40, word_embed_proj_dim=32, dropout=0.0),
}
FAMILIES = list(CONFIGS)
# A batch of token ids, and which of them are padding (0), on the left.
IDS = torch.tensor([[5, 17, 52, 3, 41, 9, 27], [0, 0, 0, 42, 8, 30, 21], [0, 44, 2, 36, 55, 13, 50]])
LEFT = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])


def dtype(family: str) -> torch.dtype:
    """Gemma 2 has eager attention only, whose softmax is in float32 and gives NaN for padding in float64 models."""
    return torch.float32 if family == "gemma2" else torch.float64


def tolerance(family: str) -> float:
    return 2e-5 if family == "gemma2" else 1e-10


class Toy(nn.Module):
    """y = base(x) + causal attention over rank-4 features of x, in plain PyTorch."""

    def __init__(self, base: nn.Module, key: str, rank: int = 4) -> None:
        super().__init__()
        self.base, self.key, self.enabled, self.calls = base, key, True, 0
        out_features, in_features = base.weight.shape if isinstance(base, nn.Linear) else base.weight.shape[::-1]
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))

        def random(*shape: int) -> nn.Parameter:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
            return nn.Parameter(values.to(base.weight.dtype))

        self.A, self.B, self.qkv = random(rank, in_features), random(out_features, rank), random(3 * rank, rank)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        if not torch.compiler.is_compiling():  # it would compile each step again
            self.calls += 1
        context = sequence.required()
        batch, time = context.shape
        q, kv = (x @ self.A.T @ self.qkv.T).view(batch, time, -1).tensor_split([len(self.A)], -1)
        kept = context.past(self.key, "toy", kv)
        context.keep(self.key, "toy", kv.detach())
        k, v = (kv if kept is None else torch.cat((kept, kv), 1)).chunk(2, -1)
        past, segments = context.sequence.past, context.sequence.segments
        allowed = torch.ones(time, k.shape[1], dtype=torch.bool).tril(past).expand(batch, -1, -1)
        if segments is not None:
            own = segments[:, past:, None]
            allowed = allowed & (own == segments[:, None]) & (own >= 0)
        scores = (3 * q @ k.mT).masked_fill(~allowed, torch.finfo(q.dtype).min)
        weights = scores.softmax(-1).masked_fill(~allowed, 0)
        return self.base(x) + (weights @ v @ self.B.T).view(*x.shape[:-1], -1)


def plain(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """The same model at every call, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).to(dtype(family)).eval()
    model.generation_config.eos_token_id = None  # so that every run has the full length
    return model


def with_toys(model: PreTrainedModel, rank: int = 4, targets: tuple[str, ...] = ("",)) -> PreTrainedModel:
    """`model` with a toy around every linear layer of its decoder layers whose name ends as one of `targets`."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and name.endswith(targets):
            model.set_submodule(name, Toy(module, name, rank))
    return model


def toys(model: nn.Module) -> list[Toy]:
    return [module for module in model.modules() if isinstance(module, Toy)]


class ExpectedEntries:
    """What the toys of a model will ask of the cache."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> list[tuple[str, str]]:
        return [(toy.key, "toy") for toy in toys(self.model) if toy.enabled]


def attached(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    model = with_toys(plain(family, seed))
    sequence.attach(model)
    return model


def to_compile() -> PreTrainedModel:
    """A Llama with few toys, for they all are traced."""
    model = with_toys(plain(), targets=("q_proj", "down_proj"))
    sequence.attach(model)
    return model


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def logits(model: nn.Module, ids: torch.Tensor = IDS, mask: torch.Tensor | None = LEFT, **kwargs) -> torch.Tensor:
    if mask is not None:
        kwargs = {"attention_mask": mask, "position_ids": positions(mask), **kwargs}
    with torch.no_grad():
        return model(input_ids=ids, **{"use_cache": False, **kwargs}).logits
