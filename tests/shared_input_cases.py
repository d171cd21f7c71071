"""Layers that are given the same x: their operands, and their outputs and gradients as one op and layer by layer."""

import torch
from bottleneck_cases import make

from gci_kernels import ops
from gci_kernels.ops.bottleneck import adapted_linears
from gci_kernels.ops.bottleneck.mixers import ATTENTION, GATE, IDENTITY

OUTS = (45, 17, 33)  # q, k and v of different widths
METHODS = {"lora": (IDENTITY, ()), "loramoe": (GATE, (3,)), "alora": (ATTENTION, (2, 1))}


def layers_of(method, shape=(2, 65), dtype=torch.float64, in_features=67, outs=OUTS):
    """x, and weight, bias, A, B and the mixer's weights of layers of several widths and ranks; one has no bias."""
    x, layers = None, []
    for index, out in enumerate(outs):
        how = dict(experts=4 if method == "loramoe" else 0, r=4 + 2 * index, bias=index != 1)
        made = make(shape, in_features, out, dtype=dtype, seed=index, **how)
        x = made["x"] if x is None else x
        weights = made.get("router")
        if method == "alora":
            r = how["r"]
            weights = torch.randn(3 * r, r, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
            weights = weights.div(r**0.5).to(dtype)
        layers.append([made["weight"], made["bias"], made["A"], made["B"], weights])
    return x, layers


def run(method, x, layers, impl):
    mixer, numbers = METHODS[method]
    calls = []
    for index, (weight, bias, A, B, weights) in enumerate(layers):
        operands = (x, weight, bias, A, B, weights, None, None, None)
        calls.append((operands, mixer, numbers, 2.0 + index, 0.0, impl))
    return adapted_linears(calls)


def run_apart(method, x, layers, impl="reference"):
    mixer, numbers = METHODS[method]
    return [
        ops.bottleneck_linear(x, *layer, mixer=mixer, settings=numbers, scaling=2.0 + index, impl=impl)
        for index, layer in enumerate(layers)
    ]


def leaves_of(x, layers, trained=lambda layer, name: True, x_grad=True):
    names = ("weight", "bias", "A", "B", "weights")
    made = []
    for index, layer in enumerate(layers):
        pairs = zip(names, layer, strict=True)
        made.append([None if t is None else t.clone().requires_grad_(trained(index, name)) for name, t in pairs])
    return x.clone().requires_grad_(x_grad), made


def gradients(function, method, x, layers, impl, used=(0, 1, 2), with_outputs=True, **how):
    """Outputs, dX and all gradients by name, for fixed random gradients of the outputs of the `used` layers."""
    x, layers = leaves_of(x, layers, **how)
    made = function(method, x, layers, impl)
    g, outputs, douts = torch.Generator().manual_seed(1), [], []
    for index, (y, output) in enumerate(made):
        for tensor in (y, output if with_outputs and method == "loramoe" else None):
            if tensor is None:
                continue
            dout = torch.randn(tensor.shape, generator=g, dtype=torch.float64).to(tensor)
            if index in used and tensor.requires_grad:
                outputs.append(tensor)
                douts.append(dout)
    torch.autograd.backward(outputs, douts)
    results = {f"y{index}": y.detach() for index, (y, _) in enumerate(made)} | {"dx": x.grad}
    for index, layer in enumerate(layers):
        for name, leaf in zip(("weight", "bias", "A", "B", "weights"), layer, strict=True):
            results[f"d{name}{index}"] = None if leaf is None else leaf.grad
    return results
