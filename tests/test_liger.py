"""Liger's kernels for the rest of a Llama beside ours, in either order.

Its Triton kernels need a GPU (the interpreter fails where they call methods of Python numbers), so that here their
Functions are stood in for by what they compute; which modules they are in, and what ours are then, is Liger's doing.
"""

import pytest
import torch
import toy_training as toy
from liger_kernel.transformers import _apply_liger_kernel_to_instance, rms_norm, swiglu
from torch.nn import functional
from transformers.models.llama import modeling_llama

import gci_kernels
from gci_kernels.accuracy import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


class Norm(torch.autograd.Function):
    """Its backward, as Liger's, writes into the gradient that it is given."""

    calls = 0

    @staticmethod
    def forward(ctx, x, weight, eps, *args):
        Norm.calls += 1
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return functional.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            dx = torch.autograd.grad(functional.rms_norm(x, x.shape[-1:], weight, ctx.eps), x, dy)[0]
        dy.data.copy_(dx)
        return dy, *[None] * 6


class SwiGLU(torch.autograd.Function):
    """Its backward, as Liger's, writes into what it was given: the outputs of gate_proj and up_proj."""

    calls = 0

    @staticmethod
    def forward(ctx, gate, up, *args):
        SwiGLU.calls += 1
        ctx.save_for_backward(gate, up)
        ctx.others = len(args)
        return functional.silu(gate) * up

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        s = gate.sigmoid()
        dgate, dup = dy * up * s * (1 + gate * (1 - s)), dy * gate * s
        gate.data.copy_(dgate), up.data.copy_(dup)
        return gate.data, up.data, *[None] * ctx.others


@pytest.fixture(autouse=True)
def liger_for_one_test(monkeypatch):
    """Liger also rebinds names in transformers' module, for the models that come later."""
    monkeypatch.setattr(rms_norm, "LigerRMSNormFunction", Norm)
    monkeypatch.setattr(swiglu, "LigerSiLUMulFunction", SwiGLU)
    Norm.calls = SwiGLU.calls = 0
    before = dict(vars(modeling_llama))
    yield
    vars(modeling_llama).update(before)


def made(method: str, order: str | None):
    def liger(model) -> None:
        wanted = dict(rope=False, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=True, swiglu=True)
        _apply_liger_kernel_to_instance(model, **wanted)

    plain = toy.plain()
    if order == "before":
        liger(plain)
    torch.manual_seed(1)
    model = gci_kernels.patch(plain, toy.CONFIGS[method](0.0)).double()
    if order == "after":
        liger(model.get_base_model())
    return model


def results(model) -> tuple:
    """Report, loss, gradients of the adapters, generated tokens."""
    loss = model(**toy.collate(toy.samples()[:2])).loss
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    tokens = model.eval().generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    return list(gci_kernels.report(model)), loss.item(), gradients, tokens.tolist()


@pytest.mark.parametrize("order", ("before", "after"))
@pytest.mark.parametrize("method", toy.METHODS)
def test_llama_with_liger_kernels_around_ours(method, order):
    report, loss, gradients, tokens = results(made(method, None))
    assert (Norm.calls, SwiGLU.calls) == (0, 0)
    beside = results(made(method, order))
    assert beside[0] == report and beside[1] == pytest.approx(loss, rel=1e-6)
    assert relative_error(beside[2], gradients) < 1e-6 and beside[3] == tokens
    # One training forward and four in generation; two layers with two norms and an MLP each, and the last norm.
    assert (Norm.calls, SwiGLU.calls) == (25, 10)


@pytest.mark.parametrize("method", ("lora", "alora"))
def test_unpatch_leaves_liger_in_place(method):
    model = gci_kernels.unpatch(made(method, "before"))
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert (Norm.calls, SwiGLU.calls) == (5, 2)
