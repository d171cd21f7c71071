"""A tiny Llama whose linear layers are quantised by one library or another; the fixtures are for test_other_bases*.

bitsandbytes and torchao come with the test extra. HQQ is tried where it is installed: it has no wheels, and building
it starts a build of CUDA code. Of GPTQ, AWQ and AQLM, whose kernels need a GPU or a compiler of their own, PEFT's
adapter layers are tried over a stand-in.
"""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from gci_kernels.tuners import AdaptedLinear

TARGETS = ["q_proj", "down_proj"]

IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 77], [1, 44, 2, 96, 55, 13, 70]])

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama with biases in its linear layers, saved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, initializer_range=0.2, attention_bias=True,
        mlp_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path := tmp_path_factory.mktemp("llama"))
    return path


def _loaded(quantization):
    """from_pretrained with what `quantization` makes of the dtype."""

    def load(folder, dtype: torch.dtype) -> nn.Module:
        return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization(dtype))

    return load


def _hqq(folder, dtype: torch.dtype) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq has no wheels, and building it starts nvcc")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            config = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
            layer = quantize.HQQLinear(module, config, compute_dtype=dtype, device="cpu")
            model.model.set_submodule(name, layer)
    return model


BASES = {
    "nf4": _loaded(
        lambda dtype: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    ),
    "int8": _loaded(lambda dtype: BitsAndBytesConfig(load_in_8bit=True)),
    "torchao int8": _loaded(lambda dtype: TorchAoConfig(Int8WeightOnlyConfig())),
    "torchao int4": _loaded(lambda dtype: TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(32)))),
    "hqq": _hqq,
}


# What the base product's column of the report says.
OWN_CALL = {
    "nf4": "own call: Linear4bit is not torch.nn.Linear",
    "int8": "own call: Linear8bitLt is not torch.nn.Linear",
    "torchao int8": "own call: its weight is a Int8Tensor",
    "torchao int4": "own call: its weight is a IntxUnpackedToInt8Tensor",
    "hqq": "own call: HQQLinear is not torch.nn.Linear",
}


@pytest.fixture(params=BASES)
def base(request) -> str:
    return request.param


def lora_config(**changes) -> LoraConfig:
    """LoRA with an effect (B is random)."""
    return LoraConfig(**dict(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False) | changes)


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (lora.LoraLayer, AdaptedLinear))]


class QuantLinear(nn.Module):
    """Keeps its weight as GPTQ's, AWQ's and AQLM's layers do: not as a weight."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = self.infeatures = in_features
        self.out_features = self.outfeatures = out_features
        self.register_buffer("qweight", torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 16)
