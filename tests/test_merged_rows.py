"""MergedRows: the kept copy of W is what it should be after every way to change what it is made of, and no other."""

import copy
import pickle

import pytest
import torch
from torch import nn

from gci_kernels.accuracy import relative_error
from gci_kernels.ops import MergedRows, loki_linear

POSITIONS = torch.tensor([11, 0, 5])


class Layer(nn.Module):
    """The least that keeps a MergedRows."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 7, dtype=dtype), requires_grad=False)
        self.active = nn.Parameter(torch.randn(3, 7, dtype=dtype))
        self.register_buffer("positions", POSITIONS.clone())
        self.merged = MergedRows()

    def copy(self, dtype=None):
        return self.merged.renewed(self.weight, self.active, self.positions, dtype or self.weight.dtype)

    def expected(self, dtype=None):
        rows = self.weight.detach().clone()
        rows[self.positions] = self.active.detach().to(rows.dtype)
        return rows.to(dtype or rows.dtype)

    def forward(self, x):
        return loki_linear(x, self.weight, None, self.active, self.positions, merged=self.merged)


def optimizer_step(layer):
    layer.active.grad = torch.randn_like(layer.active)
    torch.optim.AdamW([layer.active], lr=0.1).step()


def foreach_step(layer):
    layer.active.grad = torch.randn_like(layer.active)
    torch.optim.SGD([layer.active], lr=0.1, foreach=True).step()


def unseen_write(layer):
    layer.active.data.add_(1)  # torch does not count it


def raw_write(layer):
    layer.active.detach().numpy()[0, 3] = 7.0  # as an optimizer of another library would


def replaced_data(layer):
    layer.active.data = torch.randn(3, 7)


def replaced_parameter(layer):
    layer.active = nn.Parameter(torch.randn(3, 7))


def loaded(layer):
    layer.load_state_dict(Layer().state_dict())


def assigned(layer):
    layer.load_state_dict(Layer().state_dict(), assign=True)


def new_positions(layer):
    layer.positions = torch.tensor([1, 2, 3])


def written_positions(layer):
    layer.positions.copy_(torch.tensor([1, 2, 3]))


def unseen_positions(layer):
    layer.positions.numpy()[:] = [4, 6, 8]


def new_weight(layer):
    layer.weight = nn.Parameter(torch.randn(12, 7), requires_grad=False)


def written_weight(layer):
    with torch.no_grad():
        layer.weight.add_(1)


def unseen_weight(layer):
    layer.weight.data.mul_(1.5)  # what peft does when it merges another adapter


def double(layer):
    layer.double()


def there_and_back(layer):
    layer.bfloat16().float()  # the same addresses may come back, with other numbers


def added_row(layer):
    layer.active = nn.Parameter(torch.randn(4, 7))
    layer.positions = torch.tensor([3, 9, 1, 0])


CHANGES = (
    optimizer_step, foreach_step, unseen_write, raw_write, replaced_data, replaced_parameter, loaded, assigned,
    new_positions, written_positions, unseen_positions, new_weight, written_weight, unseen_weight, double,
    there_and_back, added_row,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("inference", (False, True))
def test_never_stale(change, inference):
    layer = Layer()
    with torch.inference_mode(inference):
        assert torch.equal(layer.copy(), layer.expected())
    for _ in range(2):
        change(layer)
        with torch.inference_mode(inference):
            assert torch.equal(layer.copy(), layer.expected())
        assert not layer.copy().is_inference()


@pytest.mark.smoke
def test_renewed_exactly_when_active_changed():
    layer = Layer()
    first = layer.copy()
    versions = []
    for _ in range(3):
        for _ in range(3):
            assert layer.copy() is first
            versions.append(first._version)
        optimizer_step(layer)
    assert versions == [version for version in sorted(set(versions)) for _ in range(3)] and len(set(versions)) == 3


def test_a_layer_trained_with_a_copy_takes_the_steps_of_one_without():
    torch.manual_seed(0)
    layer = Layer(torch.float64)
    other = copy.deepcopy(layer)
    optimizers = [torch.optim.AdamW([each.active], lr=0.05) for each in (layer, other)]
    for step in range(6):
        x, target = torch.randn(40, 7, dtype=torch.float64), torch.randn(40, 12, dtype=torch.float64)
        outputs = layer(x), loki_linear(x, other.weight, None, other.active, other.positions, impl="reference")
        for y, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            (y - target).square().mean().backward()
            optimizer.step()
        assert relative_error(outputs[0], outputs[1]) < 1e-12, step
    assert layer.merged.has(torch.device("cpu"))


def test_two_forwards_before_their_backwards():
    layer = Layer()
    a, b = torch.randn(20, 7), torch.randn(20, 7)
    (layer(a).sum() + layer(b).square().sum()).backward()
    plain = Layer()
    plain.load_state_dict(layer.state_dict())
    y = [loki_linear(x, plain.weight, None, plain.active, plain.positions, impl="reference") for x in (a, b)]
    (y[0].sum() + y[1].square().sum()).backward()
    assert relative_error(layer.active.grad, plain.active.grad) < 1e-6


def test_a_backward_after_the_rows_have_changed_raises():
    layer = Layer()
    x = torch.randn(20, 7, requires_grad=True)
    y = layer(x).sum()
    optimizer_step(layer)
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_made_by_training_and_used_by_what_follows():
    layer, cpu = Layer(), torch.device("cpu")
    with torch.no_grad():
        layer(torch.randn(20, 7))
    assert not layer.merged.has(cpu)
    layer(torch.randn(20, 7))
    assert layer.merged.has(cpu)
    before = layer.copy()
    unseen_write(layer)
    with torch.no_grad():
        y = layer(torch.eye(7).repeat(3, 1))
    assert torch.equal(y[:7], layer.expected().t()) and layer.copy() is before


def test_one_copy_for_each_dtype_in_turn():
    layer = Layer()
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        assert torch.equal(layer.copy(dtype), layer.expected(dtype))


def test_a_partitioned_weight_is_merged():
    layer, merged = Layer(), MergedRows()
    rest = torch.tensor([row for row in range(12) if row not in POSITIONS])
    for _ in range(2):
        made = merged.renewed(layer.weight.detach()[rest], layer.active, layer.positions, torch.float32, rest)
        assert torch.equal(made, layer.expected())
        optimizer_step(layer)


def test_copies_are_not_copied():
    layer, cpu = Layer(), torch.device("cpu")
    layer.copy()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not twin.merged.has(cpu) and layer.merged.has(cpu)
        assert torch.equal(twin.copy(), layer.copy()) and twin.copy() is not layer.copy()
    layer.merged.drop()
    assert not layer.merged.has(cpu)
