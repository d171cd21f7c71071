"""The attention's Triton kernels: interpreted on CPU tensors (attention_triton_cases.py), and what they refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gci_kernels.ops.attention import triton as attention


def test_interpreted(tmp_path):
    """Triton reads TRITON_INTERPRET when a kernel is defined, so no process can have it both ways."""
    cases = Path(__file__).with_name("attention_triton_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]


def arguments(dtype=torch.float32, device="meta"):
    """What backward takes, by name, before num_heads."""
    wide = {name: torch.ones(2, 3, 8, dtype=dtype, device=device) for name in ("do", "q", "k", "v", "o")}
    return wide | {"lse": torch.ones(2, 2, 3, device=device)}


def calls(given, num_heads=2, segments=None):
    yield lambda: attention.forward(given["q"], given["k"], given["v"], num_heads, segments)
    yield lambda: attention.backward(**given, num_heads=num_heads, segments=segments)


def test_cpu_tensors_are_refused():
    for call in calls(arguments(device="cpu")):
        with pytest.raises(ValueError, match="^q must be on a GPU .* got one on cpu; set TRITON_INTERPRET=1"):
            call()
    for call in calls(arguments(), segments=torch.zeros(2, 3, dtype=torch.int32)):
        with pytest.raises(ValueError, match="^segments must be on a GPU"):
            call()


@pytest.mark.parametrize("dtype", (torch.float64, torch.int32))
def test_other_dtypes_are_refused(dtype):
    for call in calls(arguments(dtype)):
        with pytest.raises(ValueError, match="^q must be one of bfloat16, float16, float32, got"):
            call()


@pytest.mark.parametrize("name", ("k", "v", "do", "o", "lse"))
def test_mixed_dtypes_are_refused_by_name(name):
    given = arguments()
    given[name] = given[name].half()
    for call in list(calls(given))[name not in "kv" :]:
        with pytest.raises(ValueError, match=f"^{name} must be one of float32, got float16"):
            call()


@pytest.mark.parametrize("dtype", (torch.int64, torch.bool))
def test_other_segments_are_refused(dtype):
    for call in calls(arguments(), segments=torch.zeros(2, 3, dtype=dtype, device="meta")):
        with pytest.raises(ValueError, match="^segments must be one of int32, got"):
            call()


def test_wide_heads_are_refused():
    given = arguments()
    given |= {name: torch.ones(2, 3, 130, device="meta") for name in ("do", "q", "k", "v", "o")}
    for call in calls(given):
        with pytest.raises(ValueError, match="num_heads must leave heads of at most 64 .* got 2 heads of 65"):
            call()
