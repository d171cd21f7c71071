"""The formulas of the package's methods in eager PyTorch, to compare patched models with."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, softmax
from transformers import GenerationMixin, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gci_kernels.tuners import AdaptedLinear, ALoRALinear, LoKILinear, LoRAMoELinear

from .inputs import BATCH

ADAPTER = "default"


class PlainLayer(nn.Module):
    """A base layer with a copy of an adapter's parameters, under the names that they have in the patched layer."""

    def __init__(self, layer: AdaptedLinear, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        for part in layer.adapter_layer_names:
            found = getattr(layer, part)
            own = {ADAPTER: nn.Parameter(found[ADAPTER].detach().clone())} if ADAPTER in found else {}
            setattr(self, part, nn.ParameterDict(own))
        self.scaling = layer.scaling[ADAPTER]

    @property
    def weight(self) -> Any:
        """The base layer's, whose dtype some parent modules read."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base layer's."""
        return self.base_layer.bias

    def own(self, part: str) -> Tensor:
        """One of the adapter's parameters."""
        return getattr(self, part)[ADAPTER]


class PlainLoRAMoE(PlainLayer):
    """y = W x + scaling * sum over experts of gate * B A x; the gates are the router's softmax."""

    def forward(self, x: Tensor) -> Tensor:
        """From x [..., in] to [..., out]."""
        gates = softmax(x @ self.own("loramoe_router").T, dim=-1)
        down = (x @ self.own("loramoe_A").T).unflatten(-1, (gates.shape[-1], -1))
        mixed = (down * gates.unsqueeze(-1)).flatten(-2)
        return self.base_layer(x) + self.scaling * (mixed @ self.own("loramoe_lora_B").T)


class PlainALoRA(PlainLayer):
    """y = W x + scaling * B attention(A x), causal over the sequence.

    Instead of keys and values it stores its inputs, and computes the whole sequence again for a single new token. A
    layer that several decoder layers share, or that a model runs in a loop, has another sequence in each call.
    """

    def __init__(self, layer: ALoRALinear, base: nn.Module) -> None:
        super().__init__(layer, base)
        self.heads = layer.configs[ADAPTER].num_heads
        self.before: dict[int, Tensor] = {}  # the inputs so far, by the number of the call within a forward
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """From x [tokens of the whole batch, in] or [batch, tokens, in] to the same shape with out."""
        rows = x.reshape(BATCH, -1, x.shape[-1])
        new, call = rows.shape[1], self.calls
        if new == 1 and call in self.before:
            rows = torch.cat((self.before[call], rows), dim=1)
        self.before[call] = rows.detach()
        self.calls += 1
        projected = rows @ self.own("gci_alora_A").T @ self.own("gci_alora_qkv").T
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected.chunk(3, dim=-1))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        update = (attended @ self.own("gci_alora_B").T)[:, -new:]
        return self.base_layer(x) + self.scaling * update.reshape(*x.shape[:-1], -1)


class PlainLoKI(PlainLayer):
    """y = W x, with some rows of W replaced."""

    def __init__(self, layer: LoKILinear, base: nn.Module) -> None:
        super().__init__(layer, base)
        self.rows = layer.loki_positions[ADAPTER].clone()

    def forward(self, x: Tensor) -> Tensor:
        """From x [..., in] to [..., out]."""
        y = self.base_layer(x)
        trained = x @ self.own("loki_active").T
        if ADAPTER in self.loki_active_bias:
            trained = trained + self.own("loki_active_bias")
        return y.index_copy(-1, self.rows, trained)


_PLAIN: dict[type, type[PlainLayer]] = {LoRAMoELinear: PlainLoRAMoE, ALoRALinear: PlainALoRA, LoKILinear: PlainLoKI}


def plain_model(base: PreTrainedModel, patched: nn.Module) -> PreTrainedModel:
    """A copy of `base` with plain layers in place of the adapted ones of `patched`, a PeftModel of another copy."""
    model = copy.deepcopy(base).requires_grad_(False)
    made: dict[int, nn.Module] = {}
    for name, layer in patched.get_base_model().named_modules(remove_duplicate=False):
        if isinstance(layer, AdaptedLinear):
            if id(layer) not in made:
                made[id(layer)] = _plain(layer, model.get_submodule(name))
            model.set_submodule(name, made[id(layer)])
    for module in model.modules():
        if isinstance(module, GenerationMixin):  # some models generate with a language model inside them
            module.register_forward_pre_hook(_reset_calls)
    return model


def _plain(layer: AdaptedLinear, base: nn.Module) -> PlainLayer:
    return next(plain for cls, plain in _PLAIN.items() if isinstance(layer, cls))(layer, base)


def _reset_calls(model: nn.Module, args: tuple) -> None:
    for layer in model.modules():
        if isinstance(layer, PlainALoRA):
            layer.calls = 0


def start_sequence(model: nn.Module) -> None:
    """Drops the inputs that plain ALoRA layers have stored."""
    for layer in model.modules():
        if isinstance(layer, PlainALoRA):
            layer.before = {}


def is_linear(module: nn.Module) -> bool:
    """Whether every method can adapt the layer."""
    return isinstance(module, (nn.Linear, Conv1D))
