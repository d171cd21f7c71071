"""On a GPU the library's products get rows that start at multiples of 16 bytes, and give what they give without."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_decoding import adapted

from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.ops.row_linear import aten, autograd, plan, reference

FORMS = ("kept", "merge", "overwrite")


class Products(TorchDispatchMode):
    """Keeps the matrices that each product reads and writes."""

    def __init__(self):
        super().__init__()
        self.operands = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.operands += [t for t in (*args, result) if isinstance(t, torch.Tensor) and t.dim() == 2]
        return result


def row_bytes(t):
    return max(t.stride()) * t.element_size()


def operands(k, device, dtype, tokens=130, out=96, width=64):
    torch.manual_seed(0)
    sizes = {"x": (tokens, width), "weight": (out, width), "active": (k, width), "dy": (tokens, out), "bias": (out,)}
    made = {name: torch.randn(size, dtype=dtype, device=device) for name, size in sizes.items()}
    return made, torch.randperm(out)[:k].to(device)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("k", (1, 9, 64, 409))
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_all_products_are_aligned(form, k, dtype):
    """The meta device takes a GPU's way; 409 rows are 10% of 4096, and 818 bytes in bfloat16."""
    t, positions = operands(k, "meta", dtype, out=512)
    with Products() as products:
        aten.forward(t["x"], t["weight"], t["bias"], t["active"], positions, form)
        aten.forward(t["x"], t["weight"], None, t["active"], positions, form)
        gradients = autograd._row_linear_backward(
            t["dy"], t["x"], t["weight"], t["active"], positions, form, [True, True, True]
        )
    assert len(products.operands) >= 8
    assert all(row_bytes(each) % 16 == 0 for each in products.operands), [each.stride() for each in products.operands]
    assert [tuple(each.shape) for each in gradients] == [(130, 64), (k, 64), (k,)]
    assert all(each.is_contiguous() for each in gradients)


def test_only_a_gpu_pads():
    assert [plan.padded(k, "cuda") for k in (1, 16, 17, 409)] == [16, 16, 32, 416]
    assert [plan.padded(k, "cpu") for k in (1, 16, 17, 409)] == [1, 16, 17, 409]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("tokens", (1, 7, 130))
@pytest.mark.parametrize("k", (9, 16, 33, 96))
@pytest.mark.parametrize("form", FORMS)
def test_padded_products_are_the_same(form, k, tokens, dtype, monkeypatch):
    for module in (aten, autograd):
        monkeypatch.setattr(module, "padded", lambda k, device: plan.padded(k, "cuda"))
    t, positions = operands(k, "cpu", dtype, tokens)
    inputs = {**t, "active_bias": torch.randn(k, dtype=dtype)}

    def by_formula(dtype):
        own = {name: each.to(dtype, copy=True).requires_grad_() for name, each in inputs.items()}
        args = own["x"], own["weight"], own["bias"], own["active"], positions, own["active_bias"]
        y = reference.loki_linear(*args)
        return [y, *torch.autograd.grad(y, [args[0], args[3], args[5]], own["dy"])]

    weight = aten.merge(t["weight"], t["active"], positions) if form == "kept" else t["weight"]
    x, active, bias = (inputs[name].clone().requires_grad_() for name in ("x", "active", "active_bias"))
    y = autograd.row_linear(x, weight, t["bias"], active, positions, bias, form)
    actual = [y, *torch.autograd.grad(y, (x, active, bias), t["dy"])]
    for found, plain, wanted in zip(actual, by_formula(dtype), by_formula(torch.float64), strict=True):
        assert relative_error(found, wanted) <= error_bound(relative_error(plain, wanted), dtype)


def test_rows_that_replace_columns_of_a_base_of_its_own_are_aligned():
    """As over a quantised base layer, or where several adapters are active."""
    layer = adapted("loki").base_model.model.model.layers[0].mlp.down_proj
    x, y = torch.randn(2, 20, layer.in_features), torch.randn(2, 20, layer.out_features)
    wanted = layer._replace_columns(y, x, "default", in_place=False)
    layer, x, y = layer.to("meta"), x.to("meta").requires_grad_(), y.to("meta")
    with Products() as products:
        found = layer._replace_columns(y, x, "default", in_place=False)
        found.sum().backward()
    assert found.shape == wanted.shape and layer.loki_active["default"].grad.shape == (3, layer.in_features)
    assert len(products.operands) >= 8 and all(row_bytes(each) % 16 == 0 for each in products.operands)
