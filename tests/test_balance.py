"""The localized balancing constraint against a restatement of its definition."""

import pytest
import torch

from gci_kernels.ops import balance_loss


def restated(gates, task_types, delta, mask=None):
    batch, time, experts = gates.shape
    z = []
    for b in range(batch):
        for n in range(experts):
            tokens = range(time) if mask is None else [t for t in range(time) if mask[b, t]]
            q = sum(gates[b, t, n] for t in tokens)
            in_first_half = n < experts // 2
            favoured = in_first_half if task_types[b] == 1 else not in_first_half
            z.append(q * (1 + delta if favoured else 1 - delta))
    z = torch.stack([torch.as_tensor(value) for value in z])
    return ((z - z.mean()) ** 2).sum() / (len(z) - 1) / (z.mean() ** 2 + 1e-10)


@pytest.mark.smoke
@pytest.mark.parametrize("delta", (0.0, 0.1, 1.0))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_equals_definition(delta, masked, dtype):
    torch.manual_seed(0)
    gates = torch.randn(3, 7, 6, dtype=dtype).softmax(-1).requires_grad_()
    task_types = torch.tensor([1, 0, 1])
    mask = (torch.arange(7) < torch.tensor([[7], [4], [2]])).long() if masked else None
    loss = balance_loss(gates, task_types, delta=delta, attention_mask=mask, num_experts=6)
    expected = restated(gates, task_types, delta, mask)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert loss.dtype == dtype and torch.isclose(loss, expected, rtol=tolerance)
    for actual, wanted in zip(torch.autograd.grad(loss, gates), torch.autograd.grad(expected, gates), strict=True):
        assert torch.allclose(actual, wanted, rtol=100 * tolerance, atol=tolerance)


def test_it_separates_the_groups():
    """The loss is lowest where each sample's mass lies against I: descending it favours the other half."""
    logits = torch.zeros(2, 5, 4, requires_grad=True)
    types = torch.tensor([1, 0])
    balance_loss(logits.softmax(-1), types, delta=0.5, num_experts=4).backward()
    assert (logits.grad[0, :, :2] > 0).all() and (logits.grad[0, :, 2:] < 0).all()
    assert (logits.grad[1, :, :2] < 0).all() and (logits.grad[1, :, 2:] > 0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(num_experts=6), ValueError, "gates must be"),
        (dict(gates=[[[0.5, 0.5]]]), TypeError, "gates must be a tensor, got list"),
        (dict(task_types=[0, 1]), TypeError, "task_types must be a tensor, got list"),
        (dict(attention_mask=[[1]]), TypeError, "attention_mask must be a tensor, got list"),
        (dict(gates=torch.rand(2, 4)), ValueError, "gates must be"),
        (dict(gates=torch.rand(2, 5, 3), num_experts=3), ValueError, "num_experts must be even"),
        (dict(delta=1.5), ValueError, "delta must be in"),
        (dict(delta=float("nan")), ValueError, "delta must be in"),
        (dict(task_types=torch.tensor([1])), ValueError, "task_types must be"),
        (dict(task_types=torch.tensor([0.0, 1.0])), TypeError, "task_types must be integer"),
        (dict(attention_mask=torch.ones(2, 4)), ValueError, "attention_mask must be"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = dict(gates=torch.rand(2, 5, 4), task_types=torch.tensor([0, 1]), delta=0.1, num_experts=4)
    with pytest.raises(error, match=message):
        balance_loss(**{**arguments, **change})
