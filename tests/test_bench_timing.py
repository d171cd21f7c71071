"""The benchmark's clock, byte counts and eager baselines."""

import sys
import time

import golden_data
import pytest
import torch
from torch import nn

import gci_kernels
from gci_kernels.accuracy import relative_error
from gci_kernels.bench import timing
from gci_kernels.bench.baselines import EagerLoKILinear, EagerLoRAMoELinear, adapter_leaves, stack
from gci_kernels.ops import MergedRows

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


# The clock and the byte counts


def test_interleave_rotates_the_order_and_leaves_warmup_out() -> None:
    calls: list[str] = []
    rounds: list[int] = []
    fns = {name: lambda name=name: calls.append(name) for name in "abc"}
    result = timing.interleave(fns, device=CPU, rounds=3, warmup=1, advance=lambda *_: rounds.append(len(calls)))
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert rounds == [3, 6, 9, 12]
    assert {name: len(measured.samples) for name, measured in result.items()} == {"a": 3, "b": 3, "c": 3}


def test_interleave_prepares_every_call_outside_its_time() -> None:
    calls: list[str] = []
    fns = {name: lambda name=name: calls.append(name) for name in "ab"}
    prepare = lambda: (calls.append("-"), time.sleep(0.02))  # noqa: E731
    result = timing.interleave(fns, device=CPU, rounds=1, warmup=1, prepare=prepare)
    assert "".join(calls) == "-a-b-b-a" and all(measured.median < 0.02 for measured in result.values())
    assert timing.cold_cache(CPU)() is None


def test_interleave_calls_what_comes_before_a_function_outside_its_time() -> None:
    calls: list[str] = []
    fns = {name: lambda name=name: calls.append(name) for name in "ab"}
    before = {"b": lambda: (calls.append("-"), time.sleep(0.02))}
    result = timing.interleave(fns, device=CPU, rounds=1, warmup=1, before=before)
    assert "".join(calls) == "a-b-ba" and all(measured.median < 0.02 for measured in result.values())


def test_ratio_is_taken_round_by_round() -> None:
    slow, fast = timing.Timing.of([2.0, 40.0, 6.0]), timing.Timing.of([1.0, 20.0, 2.0])
    assert (slow / fast).samples == (2.0, 2.0, 3.0)
    assert (slow / fast).median == 2.0
    assert fast.rate(10).samples == (10.0, 0.5, 5.0)
    spread = timing.Timing.of(range(11))
    assert (spread.low, spread.median, spread.high) == (1.0, 5.0, 9.0)


def test_saved_bytes_counts_storages_once_and_no_parameters() -> None:
    linear = nn.Linear(16, 8, bias=False).requires_grad_(False)
    x = torch.randn(4, 16, requires_grad=True)
    assert timing.saved_bytes(lambda: linear(x), linear) == 0  # its weight alone
    assert timing.saved_bytes(lambda: x.exp(), linear) == x.nbytes  # its own output

    def views() -> torch.Tensor:
        left, right = x.exp().chunk(2, dim=1)  # both saved by the product, both in the storage that exp saved
        return left * right

    assert timing.saved_bytes(views, linear) == x.nbytes
    linear.requires_grad_(True)
    assert timing.saved_bytes(lambda: linear(x).sum().backward(), linear) == x.nbytes


def test_saved_bytes_leaves_out_kept_copies() -> None:
    linear = nn.Linear(16, 8, bias=False).requires_grad_(False)
    linear.merged_rows = MergedRows()
    active, positions = torch.randn(2, 16, requires_grad=True), torch.tensor([3, 5])
    linear.register_buffer("positions", positions)
    linear.active = nn.Parameter(active.detach())
    x = torch.randn(32, 16)

    def forward() -> torch.Tensor:
        return gci_kernels.ops.loki_linear(x, linear.weight, None, linear.active, positions, merged=linear.merged_rows)

    assert timing.kept_copies(linear) == []
    for _ in range(2):  # the first call makes the copy
        assert timing.saved_bytes(forward, linear) == x.nbytes
    assert [copy.shape for copy in timing.kept_copies(linear)] == [(8, 16)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no other system keeps this mark")
def test_peak_memory_sees_what_was_freed_again() -> None:
    def fn() -> None:
        torch.ones(16 << 20).sum()

    fn()
    assert 60 << 20 < timing.peak_memory(fn, CPU) < 80 << 20
    assert timing.peak_memory(lambda: None, CPU) < 4 << 20


# The eager baselines


@pytest.mark.parametrize("name", golden_data.LOKI)
def test_eager_loki_layer_is_the_published_one(name: str) -> None:
    data = golden_data.load(name)[1]
    positions, bias = data["positions"], data.get("bias")
    active_bias = None if bias is None else bias[positions]
    layer = EagerLoKILinear(data["weight"], bias, data["weight"][positions], positions, active_bias)
    x = data["x"].requires_grad_()
    y = layer(x)
    y.backward(data["dy"])
    leaves = adapter_leaves(layer)
    assert leaves.keys() == ({"active"} if bias is None else {"active", "active_bias"})
    assert sum(parameter.requires_grad for parameter in layer.parameters()) == len(leaves)
    gradients = {"dx": x.grad, **{f"d{role}": leaf.grad for role, (leaf,) in leaves.items()}}
    for tensor, actual in {"y": y, **gradients}.items():
        assert relative_error(actual, data[tensor]) < 1e-10, tensor


def test_eager_loki_layer_replaces_rows_in_any_order() -> None:
    """Golden data has the base's own rows in ascending order; here both are others."""
    weight, bias, active, active_bias = (torch.randn(*shape).double() for shape in ((9, 5), (9,), (3, 5), (3,)))
    positions, x = torch.tensor([7, 0, 4]), torch.randn(2, 6, 5).double()
    layer = EagerLoKILinear(weight, bias, active, positions, active_bias)
    expected = nn.functional.linear(
        x, weight.index_copy(0, positions, active), bias.index_copy(0, positions, active_bias)
    )
    assert relative_error(layer(x), expected) < 1e-12


@pytest.mark.parametrize("name", golden_data.LORAMOE)
def test_eager_layer_is_the_published_one(name: str) -> None:
    settings, data = golden_data.load(name)
    rank = int(settings["r"])
    base = nn.Linear(*data["weight"].T.shape, bias="bias" in data, dtype=torch.float64)
    base.load_state_dict({key: data[key] for key in ("weight", "bias") if key in data})
    A, B = data["A"].flatten(0, 1), torch.cat(list(data["B"]), dim=1)
    layer = EagerLoRAMoELinear(base, A, B, data["router"], scaling=int(settings["lora_alpha"]) / rank)
    x = data["x"].requires_grad_()
    y = layer(x)
    balance = gci_kernels.ops.balance_loss(
        layer.router(x).softmax(-1),
        data["task_types"],
        delta=float(settings["balance_delta"]),
        num_experts=int(settings["num_experts"]),
    )
    ((y * data["dy"]).sum() + float(settings["balance_weight"]) * balance).backward()
    grads = {role: stack(role, [leaf.grad for leaf in leaves]) for role, leaves in adapter_leaves(layer).items()}
    assert relative_error(y, data["y"]) < 1e-5
    assert relative_error(x.grad, data["dx"]) < 1e-5
    assert relative_error(grads["A"], data["dA"].flatten(0, 1)) < 1e-5
    assert relative_error(grads["B"], torch.cat(list(data["dB"]), dim=1)) < 1e-5
    assert relative_error(grads["router"], data["drouter"]) < 1e-5
