"""What the tests of the decoding step's CUDA kernels share: a GPU, or the kernels compiled for this CPU."""

import os

import pytest
import torch

from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.ops.decode.cuda import Step
from gci_kernels.ops.decode.group import Group

ON_CPU = os.environ.get("GCI_CUDA_ON_CPU")  # the kernels as compiled by tests/cuda_on_cpu
DEVICE = "cpu" if ON_CPU else "cuda"


only_gpu = pytest.mark.skipif(ON_CPU is not None, reason="nothing to see without a GPU")


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F32, F32)]


def name(value: object) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in value) if isinstance(value, tuple) else str(value)


def randn(*shape: int, dtype: torch.dtype = F32, gap: int = 0, offset: int = 0) -> torch.Tensor:
    """Numbers whose rows lie `gap` elements of NaN apart, `offset` behind an aligned address."""
    storage = torch.full((offset + shape[0] * (shape[1] + gap),), float("nan"), dtype=dtype, device=DEVICE)
    result = storage[offset:].view(shape[0], shape[1] + gap)[:, : shape[1]]
    return result.copy_(torch.randn(shape, device=DEVICE))


def make_group(dtype: torch.dtype, sizes: tuple, first: int, count: int) -> Group:
    inside, out, rank, experts, top_k = sizes
    width = rank * max(experts, 1)
    return Group(
        randn(width, inside, dtype=dtype) * inside**-0.5, randn(out, width, dtype=dtype), 1.5, first, count,
        randn(experts, inside, dtype=dtype) * 2 * inside**-0.5 if experts else None, top_k,
    )  # fmt: skip


def plain(x: torch.Tensor, y: torch.Tensor, groups: list[Group], rows: list[int], dtype: torch.dtype) -> torch.Tensor:
    """The definition at `dtype`."""
    y = y.to(dtype, copy=True)
    for g in groups:
        for row in rows[g.first : g.first + g.count]:
            h = g.A.to(dtype) @ x[row].to(dtype)
            if g.experts:
                logits = g.router.to(dtype) @ x[row].to(dtype)
                if g.top_k:
                    left_out = logits.argsort(descending=True, stable=True)[g.top_k :]
                    logits[left_out] = float("-inf")
                h = h * logits.softmax(0).repeat_interleave(h.shape[0] // g.experts)
            y[row] += g.scaling * (g.B.to(dtype) @ h)
    return y


def step(x: torch.Tensor, y: torch.Tensor, groups: list[Group], rows: list[int]) -> torch.Tensor:
    y = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=DEVICE).copy_(y)
    Step(groups, rows, x.dtype).add(y, x)
    return y


def check(x, y, groups, rows) -> None:
    """The addition is measured, not y: what a rounding of y hides is checked at the end."""
    actual, before = step(x, y, groups, rows), y.double()
    truth, working = plain(x, y, groups, rows, torch.float64), plain(x, y, groups, rows, F32)
    rounded = working.to(y.dtype).double() - before
    bound = error_bound(relative_error(rounded, truth - before), y.dtype)
    assert relative_error(actual.double() - before, truth - before) <= bound
    touched = {row for g in groups for row in rows[g.first : g.first + g.count]}
    untouched = [row for row in range(y.shape[0]) if row not in touched]
    assert torch.equal(actual[untouched], y[untouched])
    # Each value is rounded once, from a sum that is right to float32.
    spacing = torch.finfo(y.dtype).eps * truth.abs() + 1e-5 * (truth - before).abs().max()
    assert ((actual.double() - truth).abs() <= spacing).all()
    for _ in range(2):
        assert torch.equal(step(x, y, groups, rows), actual), "the same bits twice"
