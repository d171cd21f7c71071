"""torch.func, forward-mode differentiation and second derivatives of patched models: what fused layers give."""

import pytest
import torch
from peft import PeftModel
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from toy_transforms import ALONE, METHODS, ids, llama, net, trained

from gci_kernels import patch
from gci_kernels.accuracy import relative_error
from gci_kernels.ops.frozen_linear import frozen_linear
from gci_kernels.ops.transforms import transformed
from gci_kernels.tuners import frozen

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def loss_of(model, x):
    """A function of the trained parameters."""
    return lambda parameters: functional_call(model, parameters, (x,)).pow(2).sum()


def gradients(loss, model) -> dict[str, torch.Tensor]:
    """By the fused layers' own backward."""
    parameters = trained(model)
    assert not transformed()
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def assert_same(actual, expected, tolerance: float = 1e-9) -> None:
    assert actual.keys() == expected.keys() and expected
    for name, value in expected.items():
        assert value.any() and relative_error(actual[name], value) < tolerance, name


@pytest.mark.parametrize("method", ALONE)
def test_reverse_mode(method):
    model = net(method)
    expected = gradients(model(X).pow(2).sum(), model)
    detached = {name: p.detach() for name, p in trained(model).items()}
    assert_same(grad(loss_of(model, X))(detached), expected)
    _, pull = vjp(loss_of(model, X), detached)
    assert_same(pull(torch.ones((), dtype=torch.float64))[0], expected)
    one_by_one = [gradients(model(x).pow(2).sum(), model) for x in X]
    per_sample = vmap(lambda p, x: grad(loss_of(model, x))(p), in_dims=(None, 0))(detached, X)
    assert_same(per_sample, {name: torch.stack([g[name] for g in one_by_one]) for name in detached})


@pytest.mark.parametrize("method", ALONE)
def test_all_parameters_may_be_differentiated(method):
    """Those of the base layer too, which training keeps frozen."""
    model = net(method)
    found = grad(loss_of(model, X))({name: p.detach() for name, p in model.named_parameters()})
    model.requires_grad_(True)
    weight, bias = (model.get_parameter(f"base_model.model.fc.base_layer.{part}") for part in ("weight", "bias"))
    step = torch.randn_like(weight) * 1e-6
    name = next(name for name, p in model.named_parameters() if p is weight)
    with torch.no_grad():
        losses = [loss_of(model, X)({name: weight + sign * step}) for sign in (1, -1)]
    assert float((found[name] * step).sum()) == pytest.approx(float(losses[0] - losses[1]) / 2, rel=1e-6)
    assert found[name.replace("weight", "bias")].shape == bias.shape


@pytest.mark.parametrize("no_grad", (False, True))
@pytest.mark.parametrize("method", ALONE)
def test_forward_mode(method, no_grad):
    """Without gradients recorded the layers would take a decoding step, which no tangent goes through."""
    model, tangent = net(method, torch.float32), torch.ones(5, 8)
    x = X.float().requires_grad_()
    value = model(x).pow(2).sum()
    expected = float((torch.autograd.grad(value, x)[0] * tangent).sum())
    with torch.set_grad_enabled(not no_grad):
        found = jvp(lambda x: model(x).pow(2).sum(), (x.detach(),), (tangent,))
        assert found[0].item() == pytest.approx(value.item(), rel=1e-5)
        assert found[1].item() == pytest.approx(expected, rel=1e-4)
        with forward_ad.dual_level():
            dual = model(forward_ad.make_dual(x.detach(), tangent)).pow(2).sum()
            assert forward_ad.unpack_dual(dual).tangent.item() == pytest.approx(expected, rel=1e-4)
    assert not transformed()


@pytest.mark.parametrize("method", ALONE)
def test_jacobians_and_second_derivatives(method):
    """torch.func's, torch.autograd.functional's, and a plain backward with create_graph=True."""
    model, x = net(method), X[0]
    rows = torch.stack([torch.autograd.grad(model(v)[i], v)[0] for i in range(3) for v in [x.clone().requires_grad_()]])
    for jacobian in (jacrev(model), jacfwd(model)):
        assert relative_error(jacobian(x), rows) < 1e-9
    assert relative_error(torch.autograd.functional.jacobian(model, x, vectorize=True), rows) < 1e-9

    def loss(x):
        return model(x).pow(2).sum()

    steps = 1e-5 * torch.eye(8, dtype=torch.float64)
    slopes = [[torch.autograd.grad(loss(v), v)[0] for v in [(x + s * step).requires_grad_()]][0]
              for step in steps for s in (1, -1)]  # fmt: skip
    curvature = torch.stack([(up - down) / 2e-5 for up, down in zip(slopes[::2], slopes[1::2], strict=True)])
    for found in (hessian(loss)(x), torch.autograd.functional.hessian(loss, x)):
        assert relative_error(found, curvature) < 1e-6
    penalties = []
    for impl in ("auto", "reference", "aten"):
        model = patch(model, impl=impl)
        parameters = list(trained(model).values())
        first = torch.autograd.grad(model(X).pow(3).sum(), parameters, create_graph=True)
        penalties.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), parameters))
    for other in penalties[1:]:
        for actual, expected in zip(other, penalties[0], strict=True):
            assert expected.any() and relative_error(actual, expected) < 1e-9


@pytest.mark.parametrize("method", ALONE)
def test_many_gradients_at_once(method):
    """Of one forward: by vmap over torch.autograd.grad, and by is_grads_batched."""
    model = net(method)
    parameters, y = list(trained(model).values()), model(X)
    directions = torch.randn(4, *y.shape, dtype=torch.float64)
    loop = [torch.autograd.grad(y, parameters, v, retain_graph=True) for v in directions]
    expected = [torch.stack(gradient) for gradient in zip(*loop, strict=True)]
    batched = torch.autograd.grad(y, parameters, directions, is_grads_batched=True, retain_graph=True)
    mapped = vmap(lambda v: torch.autograd.grad(y, parameters, v, retain_graph=True))(directions)
    for found in (batched, mapped):
        for actual, value in zip(found, expected, strict=True):
            assert relative_error(actual, value) < 1e-9


@pytest.mark.parametrize("method", ALONE)
def test_several_models_at_once(method):
    models = [net(method), net(method)]
    with torch.no_grad():
        for parameter in trained(models[1]).values():
            parameter.mul_(-0.5)
        expected = torch.stack([model(X) for model in models])
        parameters, buffers = stack_module_state(models)
        found = vmap(lambda p, b: functional_call(models[0], (p, b), (X,)))(parameters, buffers)
    assert relative_error(found, expected) < 1e-9


@pytest.mark.parametrize("method", ("lora", "loramoe"))
def test_dropout_is_the_transform_s(method):
    """vmap decides about randomness, as for torch's own layers."""
    model = net(method, dropout=0.5).train()
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(model)(X)
    rows = vmap(model, randomness="different")(X[:1].expand(64, -1))
    assert len(rows.unique(dim=0)) > 4
    assert len(vmap(model, randomness="same")(X[:1].expand(64, -1)).unique(dim=0)) == 1


@pytest.mark.parametrize("method", METHODS)
def test_language_model(method):
    """The loss is in float32. Per-sample gradients; forward mode with padding; a penalty on the gradient."""
    model = llama(method, torch.float64, attention="eager")  # the other has no forward mode
    samples = ids(3, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])

    def loss(parameters, ids, mask=None):
        labels = ids[None] if mask is None else ids[None].masked_fill(mask == 0, -100)
        inputs = dict(input_ids=ids[None], attention_mask=mask, labels=labels, use_cache=False)
        return functional_call(model, parameters, (), inputs).loss

    expected = [gradients(loss({}, sample), model) for sample in samples]
    detached = {name: p.detach() for name, p in trained(model).items()}
    found = vmap(grad(loss), in_dims=(None, 0))(detached, samples)
    assert_same(found, {name: torch.stack([g[name] for g in expected]) for name in detached}, 1e-5)
    tangents = {name: torch.ones_like(p) for name, p in detached.items()}
    slope = sum(float(g.sum()) for g in gradients(loss({}, samples[0], mask), model).values())
    with torch.no_grad():
        _, tangent = jvp(lambda p: loss(p, samples[0], mask), (detached,), (tangents,))
    assert float(tangent) == pytest.approx(slope, rel=1e-5)
    penalties = []
    for impl in ("auto", "reference"):
        parameters = list(trained(patch(model, impl=impl)).values())
        first = torch.autograd.grad(loss({}, samples[0], mask), parameters, create_graph=True)
        penalties.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), parameters))
    for actual, value in zip(*penalties, strict=True):
        assert relative_error(actual, value) < 1e-5


def test_generation_with_a_cache_in_forward_mode():
    """ALoRA's cache hands tangents on, as the model's own does."""
    model, tokens = llama("alora", torch.float64, attention="eager"), ids(1, 6)
    detached = {name: p.detach() for name, p in trained(model).items()}
    tangents = {name: torch.ones_like(p) for name, p in detached.items()}

    def last(parameters, split: int):
        first = dict(input_ids=tokens[:, :split])
        cache = functional_call(model, parameters, (), first).past_key_values if split else None
        rest = dict(input_ids=tokens[:, split:], past_key_values=cache, use_cache=bool(split))
        return functional_call(model, parameters, (), rest).logits[:, -1]

    with torch.no_grad():
        whole = jvp(lambda p: last(p, 0), (detached,), (tangents,))
        parts = jvp(lambda p: last(p, 4), (detached,), (tangents,))
    for actual, expected in zip(parts, whole, strict=True):
        assert expected.any() and relative_error(actual, expected) < 1e-9


def test_frozen_layers_through_float32():
    """Those that upcast_frozen swaps: transforms see the plain layer, and it may be differentiated twice."""
    layer = torch.nn.Linear(8, 6).half().requires_grad_(False)
    plain = torch.nn.Linear(8, 6).half().requires_grad_(False)
    plain.load_state_dict(layer.state_dict())
    frozen.swap_all(torch.nn.ModuleList([layer]))
    assert type(layer) is not torch.nn.Linear
    x = torch.randn(70, 8).half()
    for each in (layer, plain):
        value, tangent = jvp(each, (x,), (torch.ones_like(x),))
        rows = vmap(grad(lambda x, each=each: each(x).float().pow(2).sum()))(x)
        if each is layer:
            expected = value, tangent, rows
    for actual, other in zip((value, tangent, rows), expected, strict=True):
        assert torch.equal(actual, other)
    x = x.requires_grad_()
    y = frozen_linear(x, layer.weight, layer.bias)
    (dx,) = torch.autograd.grad(y.float().pow(2).sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(dx.float().sum(), x)
    weight = layer.weight.float()
    assert relative_error(again, 2 * (weight.t() @ weight).sum(0).expand(70, -1)) < 1e-2


@pytest.mark.parametrize("method", ALONE)
def test_compiled_transforms(method):
    """torch.compile of a torch.func transform: the formulas too, in one graph."""
    torch.compiler.reset()
    model = net(method)
    detached = {name: p.detach() for name, p in trained(model).items()}
    compiled = torch.compile(grad(loss_of(model, X)), backend="eager", fullgraph=True)
    assert_same(compiled(detached), gradients(model(X).pow(2).sum(), model))


def test_peft_model_is_what_it_was():
    model = net("lora")
    assert isinstance(model, PeftModel)
    with torch.no_grad():
        before = model(X)
        vmap(model)(X)
        assert torch.equal(model(X), before)


def test_backward_operators_refuse_to_be_differentiated():
    q, dy, weight = torch.randn(1, 3, 4, requires_grad=True), torch.randn(2, 5), torch.randn(5, 4)
    op, x, active = torch.ops.gci_kernels, torch.randn(2, 4, requires_grad=True), torch.randn(1, 4)
    o, lse = op.low_rank_attention(q, q, q, 2, None, "aten")
    for name, outputs in {
        "low_rank_attention_backward": op.low_rank_attention_backward(o, q, q, q, o, lse, 2, None, "aten"),
        "row_linear_backward": op.row_linear_backward(
            dy, x, weight, active, torch.tensor([3]), "merge", [False, True, False]
        ),
        "frozen_linear_dx": [op.frozen_linear_dx(dy.bfloat16().requires_grad_(), weight.bfloat16())],
    }.items():
        with pytest.raises(RuntimeError, match=f"gci_kernels::{name} has no derivative; use"):
            outputs[0].sum().backward()
