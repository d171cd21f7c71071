"""The published LoKI layer taken over by patch(): the same numbers, everything else untouched."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from gci_kernels import patch, report, unpatch
from gci_kernels.accuracy import relative_error
from gci_kernels.ops import MergedRows
from gci_kernels.tuners.published_loki import FusedPublishedLayer


class LoKILinear(nn.Module):
    """As far as its users see it the layer that LoKI's authors publish, in words of our own.

    Trained and frozen rows are linear layers of their own; their outputs stand side by side and are put in order.
    """

    frozen_name = "frozen"

    def __init__(self, linear: nn.Linear, rows: list[int]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.active_pos = sorted(rows)
        others = sorted(set(range(linear.out_features)) - set(rows))
        setattr(self, f"{self.frozen_name}_pos", others)
        for name, chosen, trained in (("active", self.active_pos, True), (self.frozen_name, others, False)):
            part = nn.Linear(linear.in_features, len(chosen), bias=False)
            part.weight = nn.Parameter(linear.weight.data[chosen].clone(), requires_grad=trained)
            setattr(self, name, part)
            bias = None
            if linear.bias is not None:
                bias = nn.Parameter(linear.bias.data[chosen].clone(), requires_grad=trained)
            self.register_parameter(f"{name}_bias", bias)
        self.register_buffer("index_map", torch.tensor(self.active_pos + others).argsort())

    def forward(self, x):
        parts = [getattr(self, name) for name in ("active", self.frozen_name)]
        y = torch.cat([part(x) for part in parts], -1)
        if self.active_bias is not None:
            y = y + torch.cat([self.active_bias, getattr(self, f"{self.frozen_name}_bias")])
        return y[..., self.index_map]


class Older(LoKILinear):
    """Its first version calls the frozen part otherwise."""

    frozen_name = "fixed"


Older.__name__ = "LoKILinear"


class Model(nn.Module):
    """Two such layers, and a plain one."""

    def __init__(self, cls=LoKILinear, bias=True, dtype=torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(7, 12)
        self.down = cls(nn.Linear(12, 9, bias=bias), [7, 0, 4])
        self.last = cls(nn.Linear(9, 5, bias=bias), list(range(5)))
        self.to(dtype)

    def forward(self, x):
        return self.last(self.down(self.up(x).relu()))


def gradients(model, x):
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, expected, x, tolerance=1e-12):
    actual, wanted = gradients(model, x), gradients(expected, x)
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert relative_error(actual[name], value) < tolerance, name


X = torch.randn(2, 20, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def renewals(monkeypatch):
    """How often a merged weight was asked for: what the fused forward does and the published one does not."""
    calls = []
    real = MergedRows.renewed
    monkeypatch.setattr(MergedRows, "renewed", lambda *args: calls.append(1) or real(*args))
    return calls


@pytest.mark.parametrize("cls", (LoKILinear, Older), ids=["frozen", "fixed"])
@pytest.mark.parametrize("bias", (True, False))
def test_same_numbers_in_every_step_of_a_training(cls, bias, renewals):
    model, expected = Model(cls, bias), Model(cls, bias)
    assert patch(model) is model and isinstance(model.down, FusedPublishedLayer) and isinstance(model.down, cls)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (model, expected)]
    for x in (X, X[0], X[:, :1], X[:0]):
        assert_same(model, expected, x)
        for optimizer in optimizers:
            optimizer.step()
    assert len(renewals) == 2 * 4


def test_no_copy_is_kept_of_rows_that_are_gathered_for_a_call(renewals):
    model = patch(Model())
    gradients(model, X)
    states = [vars(layer)["_gci_published"] for layer in (model.down, model.last)]
    assert all(state.merged.copies() for state in states)
    for layer in (model.down, model.last):
        layer.frozen._is_fsdp_managed_module = True
    assert_same(model, Model(), X)
    assert not any(state.merged.copies() for state in states) and len(renewals) == 2


def test_parameters_names_and_classes_stay_and_unpatch_is_exact():
    model = Model()
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    keys, attributes = list(model.state_dict()), set(vars(model.down))
    patch(patch(model))
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys and type(model.down).__name__ == "LoKILinear"
    gradients(model, X)
    assert unpatch(model) is model
    assert type(model.down) is LoKILinear and set(vars(model.down)) == attributes
    assert_same(model, Model(), X, 1e-15)
    with pytest.raises(ValueError, match="nothing to unpatch"):
        unpatch(model)


def _torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _torch_save])
def test_copies_are_independent_and_fused(duplicate, renewals):
    model = patch(Model())
    before = gradients(model, X)["y"]
    twin = duplicate(model)
    del renewals[:]
    assert torch.equal(gradients(twin, X)["y"], before) and len(renewals) == 2
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(gradients(model, X)["y"], before)


def test_changed_weights_rows_and_dtypes_are_seen():
    model, expected = patch(Model()), Model()
    gradients(model, X)
    other = Model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    other.down = LoKILinear(nn.Linear(12, 9).double(), [1, 2, 8])
    for each in (model, expected):
        each.load_state_dict(other.state_dict())
    assert_same(model, expected, X)
    for each in (model, expected):
        each.bfloat16().float()
    assert_same(model, expected, X.float(), 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X.float()).dtype == torch.bfloat16
        assert_same(model, expected, X.float(), 3e-2)


@pytest.mark.parametrize("kind", ("trained", "hook", "replaced"))
def test_layers_that_are_no_longer_what_they_were_run_their_own_forward(kind, renewals):
    model, expected = patch(Model()), Model()
    for each in (model, expected):
        if kind == "trained":
            each.down.frozen.weight.requires_grad_()
        elif kind == "hook":
            each.down.active.register_forward_hook(lambda module, args, output: output * 2)
        else:
            each.down.frozen = nn.Sequential(each.down.frozen)
    assert_same(model, expected, X)
    assert len(renewals) == 1  # of the other layer
    line = report(model)[0]
    assert line.plan is None and line.declined == {
        "trained": "its frozen rows are trained", "hook": "active: it has hooks",
        "replaced": "frozen: Sequential is not torch.nn.Linear",
    }[kind]  # fmt: skip


def test_compiled():
    model = patch(Model())
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert_same_numbers = gradients(model, X)
    actual = gradients(compiled, X)
    for name, value in assert_same_numbers.items():
        key = name if name == "y" else f"_orig_mod.{name}"
        assert relative_error(actual[key], value) < 1e-12, name


@pytest.mark.smoke
def test_report():
    lines = report(Model())
    assert [(line.name, line.method, line.shape, line.plan) for line in lines] == [
        ("down", "LoKI (published layer) 3 of 9 rows", "12 -> 9", None),
        ("last", "LoKI (published layer) 5 of 5 rows", "9 -> 5", None),
    ]
    assert lines[0].declined == "not patched: call gci_kernels.patch(model)"
    assert [line.plan for line in report(patch(Model()))] == ["rows=kept"] * 2
