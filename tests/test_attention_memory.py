"""What the attention adds to a layer's peak memory, and how its time grows; minutes, and a machine to itself."""

import statistics
import time

import pytest
import torch

from gci_kernels import ops
from gci_kernels.bench.timing import peak_memory

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


def inputs(tokens, r=16):
    torch.manual_seed(0)
    made = torch.randn(1, tokens, 3 * r)
    return [t.detach().requires_grad_() for t in made.split(r, dim=2)], torch.randn(1, tokens, r)


def step(impl, tensors, do):
    o = ops.low_rank_attention(*tensors, num_heads=4, impl=impl)
    return torch.autograd.grad(o, tensors, do)


def test_memory_at_8192_tokens():
    """q, k, v and do are the layer's own; o, the sums and three gradients are not."""
    tensors, do = inputs(8192)
    step("native", *inputs(64))
    assert peak_memory(lambda: step("native", tensors, do), CPU) < 5e6
    assert peak_memory(lambda: step("reference", tensors, do), CPU) > 1e9


def test_time_grows_as_the_square_of_the_tokens():
    seconds = {}
    for tokens in (2048, 8192):
        tensors, do = inputs(tokens)
        samples = []
        for _ in range(7):
            start = time.perf_counter()
            step("native", tensors, do)
            samples.append(time.perf_counter() - start)
        seconds[tokens] = statistics.median(samples)
    assert seconds[8192] < 1.15 * 16 * seconds[2048], seconds
