"""Layers that derive from torch.nn.Linear and return more than a tensor."""

import peft
import pytest
import torch
from torch import nn

from gci_kernels import LoKIConfig, LoRAMoEConfig, patch


class Router(nn.Linear):
    """As some models' routers: logits, and the expert of each token."""

    def forward(self, x):
        logits = super().forward(x)
        return logits, logits.argmax(-1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = Router(8, 4)

    def forward(self, x):
        return self.router(x)[0]


CONFIGS = {
    "lora": peft.LoraConfig(target_modules=["router"]),
    "loramoe": LoRAMoEConfig(r=2, num_experts=2, target_modules=["router"]),
}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("tokens", (3, 40))
@pytest.mark.parametrize("grad", (True, False))
def test_a_tuple_is_refused_in_words(method, tokens, grad):
    model = patch(Model(), CONFIGS[method])
    with torch.set_grad_enabled(grad), pytest.raises(TypeError, match="a Router returns a tuple.*exclude_modules"):
        model(torch.randn(1, tokens, 8))


def test_loki_refuses_such_a_layer_at_once():
    with pytest.raises(ValueError, match="LoKI cannot adapt router: a Router computes something else"):
        patch(Model(), LoKIConfig(positions={"router": [1, 3]}))


def test_ranks_that_peft_adds_to_a_config_are_no_typing_error():
    """PEFT writes the ranks of all-linear's target_parameters into the config, by the parameters' names."""
    config = peft.LoraConfig(target_modules=["router"], rank_pattern={r".*\.bias": 4})
    model = Model()
    model.inner = nn.Sequential(nn.Linear(4, 4))
    patch(model, config)
    config = peft.LoraConfig(target_modules=["router"], rank_pattern={r".*\.nothing": 4})
    with pytest.raises(ValueError, match="rank_pattern: no module matches"):
        patch(Model(), config)
