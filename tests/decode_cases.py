"""Adapters for decoding steps, and what the reference makes of them."""

import torch

from gci_kernels import ops
from gci_kernels.ops.decode import Group, find_step


def drawer(seed=0):
    g = torch.Generator().manual_seed(seed)
    return lambda *shape, scale=1.0, dtype: (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)


def make(tokens, in_features, out_features, rank, experts, dtype, adapter_dtype, seed=0):
    """x, A, router, B, and y, which stands for the base product."""
    draw, width = drawer(seed), rank * max(experts, 1)
    x = draw(tokens, in_features, dtype=dtype)
    A = draw(width, in_features, scale=in_features**-0.5, dtype=adapter_dtype)
    router = draw(experts, in_features, scale=in_features**-0.5, dtype=adapter_dtype) if experts else None
    B = draw(out_features, width, scale=width**-0.5, dtype=adapter_dtype)
    return x, A, router, B, draw(tokens, out_features, dtype=dtype)


def make_base(kind, in_features, out_features, dtype):
    draw = drawer(7)
    weight = None if kind == "y" else draw(out_features, in_features, scale=in_features**-0.5, dtype=dtype)
    return weight, draw(out_features, dtype=dtype) if kind == "weight and bias" else None


def expected(x, A, router, B, y, top_k, scaling=2.0, weight=None, bias=None):
    """By the reference, in the dtype of its arguments."""
    if weight is not None:
        y = torch.nn.functional.linear(x, weight, bias)
    if router is None:
        return y + ops.lora_linear(x, None, None, A, B, scaling=scaling, impl="reference")
    return y + ops.loramoe_linear(x, None, None, A, B, router, scaling=scaling, top_k=top_k, impl="reference")[0]


def double(*tensors):
    return [t if t is None else t.double() for t in tensors]


def group_of(A, router, B, scaling=2.0, top_k=None, first=0, count=1):
    return Group(A, B, scaling, first, count, router, top_k)


def run(x, A, router, B, y=None, weight=None, bias=None, scaling=2.0, top_k=None):
    """The kernel's answer, None where there is no kernel."""
    found = find_step(x, weight, bias, (group_of(A, router, B, scaling, top_k, 0, x.shape[0]),))
    return None if found is None else found.run(x, None if y is None else y.clone())
