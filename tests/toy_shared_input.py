"""Models whose layers are given the same tensor, and what their groups are; for tests of layers that share x."""

import copy
import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from toy_lora import lora_config, tiny_llama
from toy_methods import HydraLoRAConfig

import gci_kernels
from gci_kernels.accuracy import relative_error
from gci_kernels.tuners import shared_input

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "lora": lambda: lora_config(target_modules=ALL),
    "loramoe": lambda: gci_kernels.LoRAMoEConfig(r=2, num_experts=4, init_weights=False, target_modules=ALL),
    "hydralora": lambda: HydraLoRAConfig(r=4, init_weights=False, target_modules=ALL),
    "alora": lambda: gci_kernels.ALoRAConfig(r=4, num_heads=2, init_weights=False, target_modules=ALL),
}


@pytest.fixture
def no_groups():
    """Every test begins and ends without groups, and with nothing that waits."""
    gc.collect()
    for each in (shared_input._groups, shared_input._found, shared_input._given_up, shared_input._tokens):
        each.clear()
    assert not shared_input._running
    yield
    assert not shared_input._running and shared_input._thread.state.waiting is None
    assert shared_input._thread.state.forward is None


def groups_of(model):
    """The names of the layers in each group, in order."""
    names = {id(module): name.rpartition("layers.")[2] for name, module in model.named_modules()}
    found = {id(group): group for group in shared_input._groups.values() if not group.given_up}.values()
    return sorted([names[id(layer())] for layer in group.layers] for group in found if id(group.layers[0]()) in names)


def expected_groups(*numbers):
    found = []
    for number in numbers:
        found.append([f"{number}.mlp.{name}_proj" for name in ("gate", "up")])
        found.append([f"{number}.self_attn.{name}_proj" for name in "qkv"])
    return sorted(found)


def patched(method="lora", **options):
    torch.manual_seed(1)
    model = tiny_llama()
    return gci_kernels.patch(model, CONFIGS[method](), **options).eval()


class Block(nn.Module):
    """Three projections of one tensor; `between` runs between the first and the others, and may give them another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(12, 10), nn.Linear(12, 7), nn.Linear(12, 9)
        self.between = lambda x: x
        self.region = lambda function, *args: function(*args)
        self.double()

    def forward(self, x):
        x = x * 1
        return self.region(self.project, x)

    def project(self, x):
        y = self.first(x)
        x = self.between(x)
        return torch.cat((y, self.second(x), self.third(x)), dim=-1).sin()


def block():
    """A patched block with LoRA, and the same with PEFT's own forward."""
    config = LoraConfig(r=3, target_modules=["first", "second", "third"], init_lora_weights=False)
    model = get_peft_model(Block(), config)
    return gci_kernels.patch(copy.deepcopy(model)), model


def step(model, x, loss=lambda y: y.square().sum()):
    """The output and the gradients of x and of the adapters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    loss(y).backward()
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def assert_steps(fused, plain, x, **how):
    actual, expected = step(fused, x, **how), step(plain, x, **how)
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= 1e-10, name


X = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
