"""Dropout from a counter: one definition in every implementation, made again in backward, governed by torch's seed."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gci_kernels import ops
from gci_kernels.accuracy import relative_error
from gci_kernels.ops.bottleneck import aten, native, philox

# Known answers of Philox4x32-10 from the Random123 distribution: counter, key -> words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
]


def words(cols, row, seed):
    """The words behind one row, recovered bit by bit from keep_mask by bisection on p."""
    low = torch.zeros(cols, dtype=torch.int64)
    for bit in reversed(range(32)):
        trial = low + (1 << bit)
        kept = torch.stack([
            philox.keep_mask(row + 1, cols, t.item() / 2**32, seed, torch.device("cpu"))[row, i]
            for i, t in enumerate(trial)
        ])  # fmt: skip
        low = torch.where(kept, trial, low)
    return low.tolist()


def test_definition_is_philox():
    for counter, key, expected in KNOWN:
        row = counter[1] | counter[2] << 32
        assert words(4, row, key[0] | key[1] << 32) == list(expected)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (7, 67), (130, 256), (3, 130), (0, 5)])
@pytest.mark.parametrize(("seed", "count"), [(0, 1), (2**61 + 12345, 3)])
def test_native_equals_definition(threads, dtype, rows, cols, seed, count):
    threads(count)
    x = torch.randn(rows, cols, dtype=dtype)
    assert torch.equal(native.dropout(x, 0.3, seed), aten.dropout(x, 0.3, seed))
    for stages in (native, aten):
        before = x.clone()
        out = stages.dropout(x, 0.3, seed)
        assert torch.equal(x, before)
        assert stages.dropout_(x.clone(), 0.3, seed).equal(out)
        assert torch.equal(stages.dropout(torch.stack((x, x), -1)[..., 0], 0.3, seed), out)


def test_a_seed_may_be_a_tensor():
    x, seed = torch.randn(7, 30), 2**61 + 12345
    for stages in (native, aten):
        assert torch.equal(stages.dropout(x, 0.3, torch.tensor(seed)), aten.dropout(x, 0.3, seed))


def test_the_seed_is_drawn_where_the_kernels_read_it():
    """On a GPU it never passes the CPU: a captured CUDA graph draws anew in every replay."""
    with FakeTensorMode():  # knows of a GPU without one
        assert philox.draw_seed(torch.device("cuda")).device.type == "cuda"
    assert philox.draw_seed(torch.device("cpu")).device.type == "cpu"


@pytest.mark.parametrize("p", (0.05, 0.5, 0.9))
def test_rate_and_mean(p):
    x = torch.ones(1000, 1000)
    out = native.dropout(x, p, 42)
    rate = (out == 0).double().mean().item()
    assert abs(rate - p) < 5 * (p * (1 - p) / 1e6) ** 0.5
    assert out[out != 0].unique().numel() == 1 and abs(out.max().item() - 1 / (1 - p)) < 1e-6
    # Rows, columns and seeds are independent of one another.
    kept = (out != 0).double()
    for other in (kept.roll(1, 0), kept.roll(1, 1), (native.dropout(x, p, 43) != 0).double()):
        correlation = torch.corrcoef(torch.stack((kept.flatten(), other.flatten())))[0, 1].item()
        assert abs(correlation) < 5e-3


@pytest.mark.parametrize("impl", ("aten", "native"))
def test_layer_equals_reference_with_the_same_seed(impl):
    def run(impl):
        torch.manual_seed(3)
        g = [torch.randn(s, dtype=torch.float64) for s in [(6, 5, 20), (12, 20), (12,), (8, 20), (12, 8), (4, 20)]]
        leaves = [t.requires_grad_() for t in g]
        x, weight, bias, A, B, router = leaves
        torch.manual_seed(11)
        y, gates = ops.loramoe_linear(x, weight, bias, A, B, router, scaling=2.0, dropout_p=0.4, impl=impl)
        return [y, gates, *torch.autograd.grad((y.square().sum() + gates.square().sum()), leaves)]

    for actual, expected in zip(run(impl), run("reference"), strict=True):
        assert relative_error(actual, expected) < 1e-10


def test_torch_seed_governs_and_calls_differ():
    x, A, B = torch.randn(50, 30), torch.randn(4, 30), torch.randn(20, 4)

    def call():
        return ops.lora_linear(x, None, None, A, B, scaling=1.0, dropout_p=0.5)

    torch.manual_seed(0)
    first, second = call(), call()
    torch.manual_seed(0)
    assert torch.equal(first, call())
    assert not torch.equal(first, second)


def test_checkpoint_replays_the_same_mask():
    x = torch.randn(50, 30, requires_grad=True)
    A, B = torch.randn(4, 30), torch.randn(20, 4)

    def call(x):
        return ops.lora_linear(x, None, None, A, B, scaling=1.0, dropout_p=0.5).square()

    for reentrant in (True, False):
        torch.manual_seed(5)
        expected = torch.autograd.grad(call(x).sum(), x)[0]
        torch.manual_seed(5)
        y = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=reentrant)
        x.grad = None
        y.sum().backward()
        assert torch.equal(x.grad, expected)
