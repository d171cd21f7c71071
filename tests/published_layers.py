"""What the tests of conversion share: the published layers in words of our own, and their checkpoints."""

import json
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gci_kernels import LoKIConfig, patch
from gci_kernels.convert import ConvertError, convert

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
TARGETS = ["down_proj", "gate_proj", "up_proj"]
ROWS = [[5, 2, 11], []]  # as published: not in order, and a layer without any


def tiny_llama(dtype=torch.float32, bias=False, tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, mlp_bias=bias, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def logits(model):
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids).logits


def read(path):
    return json.loads(path.read_text())


def edit(path, **changes):
    """Change fields of a JSON file; None takes one out."""
    content = read(path) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def replace(model, names, make):
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, make(name, model.get_submodule(name)))
    return model


def refused(source, tmp_path, file, reason, **options):
    """One line that names the file and the reason; nothing is left."""
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ConvertError, match=reason) as caught:
        convert(source, tmp_path / "target", progress=False, **options)
    assert file in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 255
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Experts(nn.Linear):
    """As far as its checkpoints see it the layer that LoRAMoE's authors publish, in words of our own."""

    def __init__(self, linear, r, count, alpha):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.load_state_dict(linear.state_dict())
        self.count, self.scaling = count, alpha / r
        self.lora_route = nn.Linear(self.in_features, count, bias=False)
        for i in range(count):
            setattr(self, f"lora_A{i}", nn.Linear(self.in_features, r, bias=False))
            setattr(self, f"lora_B{i}", nn.Linear(r, self.out_features, bias=False))

    def forward(self, x):
        y = super().forward(x)
        gates = self.lora_route(x).softmax(-1)
        for i in range(self.count):
            update = getattr(self, f"lora_B{i}")(getattr(self, f"lora_A{i}")(x))
            y = y + gates[..., i : i + 1] * update * self.scaling
        return y


def with_experts(model, targets=TARGETS, r=3, count=4, alpha=8):
    torch.manual_seed(1)
    names = [name for name, _ in model.named_modules() if name.endswith(tuple(targets))]
    return replace(model, names, lambda name, linear: Experts(linear, r, count, alpha)).to(model.dtype)


def published_weights(model):
    return {f"base_model.model.{name}": tensor for name, tensor in model.state_dict().items() if "lora_" in name}


PUBLISHED_CONFIG = {
    "base_model_name_or_path": "llama", "bias": "none", "blc_alpha": 0.1, "blc_weight": 0.2, "enable_lora": None,
    "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 8.0, "lora_dropout": 0.05, "lora_nums": 4,
    "merge_weights": False, "modules_to_save": None, "peft_type": "LORA", "r": 3, "target_modules": TARGETS,
    "task_type": "CAUSAL_LM",
}  # fmt: skip


def save_published(folder, weights, **changes):
    folder.mkdir()
    torch.save(weights, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(PUBLISHED_CONFIG | changes))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def moe(tmp_path):
    """A published LoRAMoE adapter's folder."""
    return save_published(tmp_path / "moe", published_weights(with_experts(tiny_llama())))


LAYOUTS = {
    "newest": ("active.weight", "frozen.weight", "frozen_bias", "target_pos"),
    "parts": ("active_part.weight", "fixed_part.weight", "fixed_bias", "target_neurons"),
    "plain": ("active_weight", "fixed_weight", "fixed_bias", "target_neurons"),
}


class LoKILinear(nn.Module):
    """As far as its checkpoints see it the layer that LoKI's authors publish, in words of our own."""

    def __init__(self, linear, rows, layout="newest"):
        super().__init__()
        rows = sorted(rows)
        others = [row for row in range(linear.out_features) if row not in rows]
        self.names = LAYOUTS[layout]
        for name, chosen in zip(self.names[:2], (rows, others), strict=True):
            values = nn.Parameter(linear.weight.data[chosen].clone())
            if name.endswith(".weight"):
                part = nn.Linear(linear.in_features, len(chosen), bias=False)
                part.weight = values
                self.add_module(name.removesuffix(".weight"), part)
            else:
                self.register_parameter(name, values)
        for name, chosen in zip(("active_bias", self.names[2]), (rows, others), strict=True):
            values = None if linear.bias is None else nn.Parameter(linear.bias.data[chosen].clone())
            self.register_parameter(name, values)
        self.register_buffer("index_map", torch.tensor(rows + others).argsort())

    def forward(self, x):
        weight = torch.cat([self.get_parameter(name) for name in self.names[:2]])
        bias = None if self.active_bias is None else torch.cat([self.active_bias, getattr(self, self.names[2])])
        return F.linear(x, weight, bias)[..., self.index_map]


def split_model(model, layout="newest", rows=ROWS, trained=True):
    torch.manual_seed(2)
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2) if rows[layer] or layout != "newest"]
    replace(model, names, lambda name, linear: LoKILinear(linear, rows[int(name.split(".")[2])], layout))
    for name, parameter in model.named_parameters():
        if trained and ".active" in name:
            parameter.data.copy_(torch.randn_like(parameter))
    return model


def save_split(folder, model, layout="newest", rows=ROWS, **options):
    model.save_pretrained(folder, **options)
    edit(folder / "config.json", architectures=["LoKILlamaForCausalLM"], auto_map={"AutoModel": "x.Y"},
         **{LAYOUTS[layout][3]: rows})  # fmt: skip
    return folder


@pytest.fixture
def split(tmp_path):
    """A published LoKI model's folder; its base model's is beside it."""
    tiny_llama(bias=True).save_pretrained(tmp_path / "base")
    return save_split(tmp_path / "loki", split_model(tiny_llama(bias=True)))


def our_loki(folder, dtype=torch.float32, bias=True, r=None, positions=ROWS):
    torch.manual_seed(3)
    model = patch(tiny_llama(dtype, bias), LoKIConfig(positions=positions, r=r, init_weights=False)).eval()
    for name, parameter in model.named_parameters():
        if "active_bias" in name:
            parameter.data.normal_()
    model.save_pretrained(folder)
    return model
