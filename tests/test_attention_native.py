"""The attention in C++: threads, tiles, neighbouring memory, and every instruction set of this processor."""

import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest
import torch

from gci_kernels import native as extension
from gci_kernels.accuracy import relative_error
from gci_kernels.ops.attention import native, reference

pytestmark = pytest.mark.usefixtures("poisoned")


def run(q, k, v, do, heads, segments):
    o, lse = native.forward(q, k, v, heads, segments)
    return o, lse, *native.backward(do, q, k, v, o, lse, heads, segments)


@pytest.mark.smoke
@pytest.mark.parametrize("count", (1, 2, 3, 7))
@pytest.mark.parametrize("batch", (1, 3))
@pytest.mark.parametrize("heads", (1, 4, 5))
def test_any_number_of_threads(threads, monkeypatch, count, batch, heads):
    """Also where heads are split between threads, and where there are more parts than blocks of queries."""
    monkeypatch.setattr(native, "_ONE_THREAD_BELOW", 0)
    threads(count)
    for time, keys in ((1, 40), (150, 170)):
        q, do = torch.randn(2, batch, time, heads * 3, dtype=torch.float64)
        k, v = torch.randn(2, batch, keys, heads * 3, dtype=torch.float64)
        segments = (torch.arange(keys) // 31).int().expand(batch, keys)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        o, lse = reference.forward(*leaves, heads, segments)
        expected = [t.detach() for t in (o, lse, *torch.autograd.grad(o, leaves, do))]
        first = run(q, k, v, do, heads, segments)
        for actual, value in zip(first, expected, strict=True):
            assert relative_error(actual, value) < 1e-12
        for actual, value in zip(run(q, k, v, do, heads, segments), first, strict=True):
            assert torch.equal(actual, value)


@pytest.mark.parametrize("count", (1, 2, 3, 8, 64))
@pytest.mark.parametrize("heads", (0, 1, 2, 4, 5, 12, 1000))
def test_split_keeps_all_threads_busy(threads, count, heads):
    threads(count)
    team, parts, padded = native._schedule(extension.extension(), heads, 10000, 10000)
    assert team == (count if heads else 1)
    assert heads * parts % team == 0 or heads * parts >= 4 * team
    assert heads * (parts - 1) < 4 * team or parts == 1
    assert 10000 <= padded < 10000 + extension.extension().attention_block_keys
    assert native._schedule(extension.extension(), 4, 1, 100)[:2] == (1, 1)


@pytest.mark.parametrize("d", (1, 2, 3, 4, 6, 8, 31, 32, 64))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_neighbouring_memory_is_not_read(d, dtype):
    """Odd sizes inside tensors of NaN: what lies beside a row, before and behind the batch, must not leak in."""
    heads, r = 256 // d, 256 // d * d
    time, keys = 33, 67

    def inside(rows):
        wide = torch.full((4, rows + 2, r + 9), float("nan"), dtype=dtype)
        wide[1:3, 1:-1, 5 : r + 5] = 0.5 + torch.arange(r, dtype=torch.float64).to(dtype) / 1024
        return wide[1:3, 1:-1, 5 : r + 5]

    q, k, v, do = (inside(rows) for rows in (time, keys, keys, time))
    o, lse, dq, dk, dv = run(q, k, v, do, heads, None)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    assert relative_error(o, v[:, :time]) < tolerance  # every key is alike
    assert all(t.isfinite().all() for t in (lse, dq, dk, dv))
    counts = torch.arange(keys - time + 1, keys + 1, dtype=torch.float64).log()
    at = (q.double() * k[:, :1].double()).view(2, time, heads, d).sum(-1).transpose(1, 2) / d**0.5
    assert relative_error(lse, at + counts) < 1e-6


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_exponential_over_its_whole_range(dtype):
    """The weight of key 1 is e^-x beside that of key 0: over every exponent, and 0 in the end."""
    far = torch.tensor([100.0, 104, 120, 1e3, 1e10, 3e38, float("inf")])
    x = torch.cat((torch.linspace(0, 87, 4001), far)).to(dtype)
    q, k = torch.ones(len(x), 1, 1, dtype=dtype), torch.stack((torch.zeros_like(x), -x), 1).unsqueeze(2)
    v = torch.tensor([0.0, 1.0], dtype=dtype).view(1, 2, 1).expand(len(x), 2, 1)
    o, _ = native.forward(q, k, v, 1, None)
    truth = torch.exp(-x.double())
    truth = (truth / (1 + truth)).view_as(o)
    # float32: below e^-87 lie subnormal numbers.
    relative, absolute = (3e-7, 1e-38) if dtype == torch.float32 else (1e-14, 0)
    assert ((o - truth).abs() <= relative * truth + absolute).all()
    assert (o[-4:] == 0).all()


def test_skipping_segments_saves_their_time(threads):
    """64 packed sequences of 64 tokens: tiles that no query attends cost next to nothing."""
    threads(1)  # others at work on the machine then cannot hold a thread up
    q, k, v, do = torch.randn(4, 1, 4096, 16)
    packed = (torch.arange(4096) // 64).int().unsqueeze(0)

    def best(segments):
        times = []
        for _ in range(10):
            start = perf_counter()
            run(q, k, v, do, 4, segments)
            times.append(perf_counter() - start)
        return min(times)

    assert best(packed) < best(None) / 3


# Attention has nothing of its own above avx512.
@pytest.mark.parametrize("isa", extension.ISAS[: min(3, extension.ISAS.index(extension.ISA))])
def test_lesser_instruction_sets(isa, tmp_path):
    files = [__file__, *(str(Path(__file__).with_name(f"test_attention{name}.py")) for name in ("", "_arguments"))]
    chosen = "(native or threads or memory or exponential) and not instruction_set and not opcheck and not saves"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files],
        cwd=tmp_path, env=os.environ | {"GCI_CPU_ISA": isa}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
