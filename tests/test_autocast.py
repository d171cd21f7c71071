"""Patched models under autocast: every pairing of base's, adapters' and autocast's type, in training and generation."""

import itertools

import pytest
import torch
from toy_transforms import METHODS, ids, llama, trained, with_biases

from gci_kernels.accuracy import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# Base, adapters, autocast; those of one 16-bit type under autocast of the other above all.
TYPES = [
    (b, a, c) for b, a, c in itertools.product((BF16, F16, F32), (BF16, F16, F32), (BF16, F16)) if a != c or b != c
]


def cast(model, base: torch.dtype, adapter: torch.dtype):
    model.to(base)
    for parameter in trained(model).values():
        parameter.data = parameter.data.to(adapter)
    return model


def step(model, dtype: torch.dtype | None, backward_inside: bool = False) -> list[torch.Tensor]:
    """The loss and the gradients of what trains, in float32."""
    model.zero_grad()
    with torch.autocast("cpu", dtype or BF16, enabled=dtype is not None):
        loss = model(input_ids=ids(2, 6), labels=ids(2, 6), use_cache=False).loss
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    return [loss.detach(), *(parameter.grad.float() for parameter in trained(model).values())]


def assert_as_exact(actual, plain, truth) -> None:
    """The accuracy rule: errors at most twice those of the plain formula in the same types, plus rounding.

    Of all gradients together: a small one among them is little but the rounding of the 16-bit model around it.
    """
    found, other, value = (torch.cat([t.flatten() for t in tensors]) for tensors in (actual, plain, truth))
    assert relative_error(found, value) < 2 * relative_error(other, value) + 2e-2


def assert_close(actual, expected, tolerance: float) -> None:
    for found, value in zip(actual, expected, strict=True):
        assert relative_error(found, value) < tolerance


@pytest.mark.parametrize("method", METHODS)
def test_every_pairing_of_types(method):
    truth = step(llama(method), None)
    for base, adapter, autocast in TYPES:
        model, plain = (cast(llama(method, impl=impl), base, adapter) for impl in ("auto", "reference"))
        assert_as_exact(step(model, autocast), step(plain, autocast), truth)
        with torch.no_grad(), torch.autocast("cpu", autocast):
            cached = model.generate(ids(1, 5), attention_mask=torch.ones(1, 5), max_new_tokens=3, do_sample=False)
        assert cached.shape == (1, 8)


@pytest.mark.parametrize("method", ("lora", "loki", "loki*"))
def test_every_pairing_of_types_with_biases(method):
    truth = step(with_biases(method), None)
    for base, adapter, autocast in TYPES:
        models = (cast(with_biases(method, impl=impl), base, adapter) for impl in ("auto", "reference"))
        assert_as_exact(*(step(model, autocast) for model in models), truth)


@pytest.mark.parametrize("impl", ("auto", "reference"))
@pytest.mark.parametrize("method", METHODS)
def test_backward_inside_of_autocast(method, impl):
    for base, adapter, autocast in TYPES[:: 1 if impl == "auto" else 3]:
        model = cast(llama(method, impl=impl), base, adapter)
        assert_close(step(model, autocast, backward_inside=True), step(model, autocast), 3e-2)


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives_inside_of_autocast(method):
    model, gradients = llama(method, attention="eager"), []
    parameters = list(trained(model).values())
    for inside in (True, False):
        with torch.autocast("cpu", BF16):
            loss = model(input_ids=ids(2, 6), labels=ids(2, 6), use_cache=False).loss
            first = torch.autograd.grad(loss, parameters, create_graph=True) if inside else None
        first = first or torch.autograd.grad(loss, parameters, create_graph=True)
        gradients.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), parameters))
    assert all(g.any() for g in gradients[0])
    assert_close(*gradients, 3e-2)


def test_attention_s_cache_is_in_autocast_s_type():
    """Prompt, then one token: what one forward over both gives."""
    model = llama("alora")
    with torch.no_grad(), torch.autocast("cpu", BF16):
        whole = model(input_ids=ids(2, 6), use_cache=False).logits[:, -1]
        past = model(input_ids=ids(2, 6)[:, :5]).past_key_values
        last = model(input_ids=ids(2, 6)[:, 5:], past_key_values=past).logits[:, -1]
    assert relative_error(last, whole) < 2e-2
