"""torch's dynamic int8 (torch.ao.quantization) on patched models: the base products are int8, the adapters stay."""

import pytest
import torch
from torch import nn
from toy_transforms import ids, llama, with_biases

from gci_kernels import report
from gci_kernels.accuracy import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


def quantized(model: nn.Module) -> nn.Module:
    kinds = {nn.Linear: torch.ao.quantization.default_dynamic_qconfig}
    return torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)


def by_formula(layer, x: torch.Tensor) -> torch.Tensor:
    """LoKI's rows over what the int8 layer gives."""
    base, positions, y = layer.base_layer, layer.loki_positions["default"], layer.base_layer(x)
    if layer.r["default"]:
        update = layer.scaling["default"] * x @ layer.loki_A["default"].T @ layer.loki_lora_B["default"].T
        columns = y[..., positions] + update
        if "default" in layer.loki_active_bias:
            columns += layer.loki_active_bias["default"] - base.bias()[positions]
    else:
        bias = layer.loki_active_bias["default"] if "default" in layer.loki_active_bias else None
        columns = nn.functional.linear(x, layer.loki_active["default"], bias)
    y = y.clone()
    y[..., positions] = columns
    return y


@pytest.mark.parametrize("tokens", (1, 70))  # a decoding step, and what takes the plan's stages
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("method", ("loki", "loki*"))
def test_loki(method, bias, tokens):
    model = quantized(with_biases(method) if bias else llama(method))
    layers = [module for module in model.modules() if hasattr(module, "loki_positions")]
    assert layers and report(model)[0].base.startswith("own call: Linear is not torch.nn.Linear")
    x = torch.randn(1, tokens, layers[0].in_features)
    with torch.no_grad():
        assert "quantized" in type(layers[0].base_layer).__module__
        for layer in layers:
            assert relative_error(layer(x), by_formula(layer, x)) < 1e-5


@pytest.mark.parametrize("method", ("loramoe", "alora", "loki", "loki*"))
def test_language_model(method):
    """As near as int8 comes, and through generate. PEFT's LoRA cannot: its A and B become int8 layers, as unpatched."""
    model, tokens = llama(method), ids(2, 6)
    other = quantized(model)
    with torch.no_grad():
        assert relative_error(other(tokens).logits, model(tokens).logits) < 0.2
        settings = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False)
        assert other.generate(tokens, **settings).shape == (2, 9)
