"""The gate: forward and backward of its implementations, ties, extremes, and the pass over strided projections."""

import pytest
import torch

from gci_kernels.accuracy import relative_error
from gci_kernels.ops.gate import aten, native, reference

pytestmark = pytest.mark.usefixtures("poisoned")

IMPLS = {"aten": aten, "native": native}


def draw(tokens, experts, r, dtype, scale=1.0):
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(tokens, width, generator=g, dtype=torch.float64) * scale).to(dtype)
        for width in (experts * r + experts, experts * r, experts)
    ]


def truth(projected, du, dgates, experts, top_k, scaling):
    """u, gates, dprojected from autograd through the formula, in float64."""
    leaf = projected.double().requires_grad_()
    width = projected.shape[1] - experts
    u, gates = reference.gate(leaf[:, :width], leaf[:, width:], top_k)
    u = u * scaling
    (dprojected,) = torch.autograd.grad((u, gates), leaf, (du.double(), dgates.double()))
    return u.detach(), gates.detach(), dprojected


@pytest.mark.smoke
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("projected_dtype", "dtype", "tolerance"), [
    (torch.float64, torch.float64, 1e-13),
    (torch.float32, torch.float32, 1e-6),
    (torch.bfloat16, torch.bfloat16, 8e-3),
    (torch.float32, torch.bfloat16, 8e-3),
])  # fmt: skip
@pytest.mark.parametrize(
    ("tokens", "experts", "r", "top_k", "count"),
    [(130, 8, 4, 8, 1), (130, 8, 4, 8, 3), (1, 1, 16, 1, 3), (7, 5, 3, 2, 2), (33, 64, 1, 7, 1)],
)
def test_forward_and_backward(threads, impl, projected_dtype, dtype, tolerance, tokens, experts, r, top_k, count):
    threads(count)
    projected, du, dgates = draw(tokens, experts, r, projected_dtype)
    du, dgates = du.to(projected_dtype), dgates.to(torch.promote_types(dtype, torch.float32))
    expected_u, expected_gates, expected_d = truth(projected, du, dgates, experts, top_k, 2.0)
    u, gates = IMPLS[impl].forward(projected, experts, top_k, 2.0, dtype)
    dprojected, u_again = IMPLS[impl].backward(du, dgates, projected, experts, top_k, 2.0, dtype)
    assert u.dtype == dtype and dprojected.dtype == dtype and gates.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(gates, expected_gates) < min(tolerance, 1e-6)
    assert torch.equal(u, u_again)
    assert relative_error(u, expected_u) < tolerance
    assert relative_error(dprojected, expected_d) < tolerance


@pytest.mark.parametrize("impl", IMPLS)
def test_without_gradient_of_the_gates(impl):
    projected, du, dgates = draw(20, 4, 2, torch.float64)
    expected = truth(projected, du, torch.zeros_like(dgates), 4, 4, 1.0)[2]
    assert relative_error(IMPLS[impl].backward(du, None, projected, 4, 4, 1.0, torch.float64)[0], expected) < 1e-13


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_lower_expert(impl):
    projected = torch.ones(3, 4 * 2 + 4)
    _, gates = IMPLS[impl].forward(projected, 4, 2, 1.0, torch.float32)
    assert gates.tolist() == [[0.5, 0.5, 0.0, 0.0]] * 3


def test_the_formula_takes_the_softmax_in_float32():
    logits = torch.randn(20, 6).bfloat16()
    assert torch.equal(reference.gates(logits, 6), logits.float().softmax(-1))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_the_formula_in_a_graph_keeps_the_same_experts():
    """ONNX has no stable sort, so a graph counts which experts come before each."""
    logits = torch.randint(3, (40, 6)).float()  # many of them equal
    for top_k in (1, 2, 5, 6):
        traced = torch.jit.trace(lambda t, k=top_k: reference.gates(t, k), (torch.randn(2, 6),), check_trace=False)
        assert torch.equal(traced(logits), reference.gates(logits, top_k))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_extreme_logits_stay_finite(impl, dtype):
    logits = torch.tensor([[1e4, -1e4, 0, 1e4], [-3e38, 3e38, 0, 1], [-100, -101, -102, -90]], dtype=dtype)
    projected = torch.cat((torch.ones(3, 4, dtype=dtype), logits), dim=1)
    u, gates = IMPLS[impl].forward(projected, 4, 4, 1.0, dtype)
    assert relative_error(gates, logits.double().softmax(-1)) < 1e-6
    dprojected, _ = IMPLS[impl].backward(torch.ones_like(u), torch.ones_like(gates), projected, 4, 4, 1.0, dtype)
    assert dprojected.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("where", (0, 3, 8, 11))
@pytest.mark.parametrize("top_k", (4, 2))
def test_nan_is_carried_not_hidden(impl, where, top_k):
    projected = torch.ones(2, 12)
    projected[:, 8:10] = 2  # with top_k = 2, the first two experts
    projected[0, where] = float("nan")
    u, gates = IMPLS[impl].forward(projected, 4, top_k, 1.0, torch.float32)
    assert u[0].isnan().any() and not u[1].isnan().any()
    assert gates[0].isnan().any() == (where >= 8)


def test_native_reads_rows_of_a_wider_tensor():
    wide = torch.randn(9, 40)
    strided, dense = (native.forward(h, 4, 4, 1.0, torch.float32) for h in (wide[:, 5:17], wide[:, 5:17].clone()))
    for a, b in zip(strided, dense, strict=True):
        assert torch.equal(a, b)
