"""The Triton kernels: interpreted on CPU tensors (triton_cases.py, in a process of its own), and what they refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gci_kernels.ops.bottleneck import triton as stages
from gci_kernels.ops.gate import triton as gate

# The names of some cases, of others, and of all the rest.
PARTS = (pytest.param("gate", marks=pytest.mark.smoke), "dropout and not gate", "not gate and not dropout")


@pytest.mark.parametrize("part", PARTS)
def test_interpreted(part, tmp_path):
    """Triton reads TRITON_INTERPRET when a kernel is defined, so no process can have it both ways."""
    cases = Path(__file__).with_name("triton_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", part, str(cases)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]


def test_cpu_tensors_are_refused():
    x, m, u = torch.ones(4, 8), torch.ones(8, 2), torch.ones(4, 2)
    for call in (
        lambda: stages.project(x, m),
        lambda: stages.reduce(u, x),
        lambda: stages.dropout(x, 0.5, 1),
        lambda: stages.dropout_(x, 0.5, 1),
    ):
        with pytest.raises(ValueError, match="^[xy] must be on a GPU .* got one on cpu; set TRITON_INTERPRET=1"):
            call()
    with pytest.raises(ValueError, match="^u must be on a GPU"):
        stages.expand(u, m.t(), x, None, None)
    with pytest.raises(ValueError, match="^projected must be on a GPU"):
        gate.forward(x, 2, 2, 1.0, torch.float32)
    with pytest.raises(ValueError, match="^du must be on a GPU"):
        gate.backward(torch.ones(4, 6), None, x, 2, 2, 1.0, torch.float32)


@pytest.mark.parametrize("dtype", (torch.float64, torch.int32))
def test_other_dtypes_are_refused(dtype):
    x = torch.ones(4, 8, dtype=dtype, device="meta")
    allowed = f"must be one of bfloat16, float16, float32, got {str(dtype).removeprefix('torch.')}"
    with pytest.raises(ValueError, match=f"x {allowed}"):
        stages.project(x, x.t())
    with pytest.raises(ValueError, match=f"m {allowed}"):
        stages.expand(x.float(), x.t(), x.float(), None, None)
    with pytest.raises(ValueError, match=f"y {allowed}"):
        stages.reduce(x.float(), x)
    with pytest.raises(ValueError, match=f"projected {allowed}"):
        gate.forward(x, 2, 2, 1.0, torch.float32)
    with pytest.raises(ValueError, match="dtype must be bfloat16, float16 or float32"):
        gate.forward(x.float(), 2, 2, 1.0, dtype)


def test_mixed_dtypes_are_refused_by_name():
    x, half = torch.ones(4, 8, device="meta"), torch.ones(4, 8, device="meta", dtype=torch.float16)
    with pytest.raises(ValueError, match="^u must be one of float32, got float16"):
        stages.reduce(half, x)
    with pytest.raises(ValueError, match="^w must be one of float32, got float16"):
        stages.expand(x, x.t(), x, half.t(), None)


def test_sizes_past_31_bits_are_refused():
    x = torch.empty(2**31 - 1, 1, device="meta")
    with pytest.raises(ValueError, match=r"no size of x may pass 2147418112, got \[2147483647, 1\]"):
        stages.project(x, torch.empty(1, 1, device="meta"))
    with pytest.raises(ValueError, match="no size of projected"):
        gate.forward(x, 1, 1, 1.0, torch.float32)


def test_too_many_experts_are_refused():
    with pytest.raises(ValueError, match="num_experts must be at most 256 .* got 257"):
        gate.forward(torch.empty(1, 514, device="meta"), 257, 257, 1.0, torch.float32)
