"""row_linear's Triton kernel: interpreted on CPU tensors (row_linear_triton_cases.py), and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gci_kernels import ops
from gci_kernels.ops.row_linear import triton as row_linear


def test_interpreted(tmp_path):
    """Triton reads TRITON_INTERPRET when a kernel is defined, so no process can have it both ways."""
    cases = Path(__file__).with_name("row_linear_triton_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]


def arguments(dtype=torch.float32, device="meta", **changed):
    """What forward takes, by name."""
    shapes = {"x": (3, 8), "weight": (5, 8), "bias": (5,), "active": (2, 8)}
    made = {name: torch.ones(*shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    return made | {"positions": torch.tensor([3, 0], device=device)} | changed


def calls(given):
    yield lambda: row_linear.forward(**given, form="triton")
    rest = {name: given[name] for name in ("weight", "active", "positions")}
    yield lambda: row_linear.dx(given["x"][:, :5], **rest, chosen=None, form="triton")


def test_cpu_tensors_are_refused():
    for name, call in zip(("x", "dy"), calls(arguments(device="cpu")), strict=True):
        with pytest.raises(ValueError, match=f"^{name} must be on a GPU .* got one on cpu; set TRITON_INTERPRET=1"):
            call()
    for name in ("weight", "bias", "active", "positions"):
        given = arguments(**{name: arguments(device="cpu")[name]})
        for call in list(calls(given))[: 1 if name == "bias" else 2]:
            with pytest.raises(ValueError, match=f"^{name} must be on a GPU"):
                call()
    x = torch.ones(3, 8)
    with pytest.raises(ValueError, match="impl='triton' cannot run here: its kernels run on GPU tensors, not cpu"):
        ops.loki_linear(x, torch.ones(5, 8), None, torch.ones(1, 8), torch.tensor([4]), impl="triton")


@pytest.mark.parametrize("dtype", (torch.float64, torch.int32))
def test_other_dtypes_are_refused(dtype):
    allowed = f"must be one of bfloat16, float16, float32, got {str(dtype).removeprefix('torch.')}"
    for name, call in zip(("x", "dy"), calls(arguments(dtype)), strict=True):
        with pytest.raises(ValueError, match=f"^{name} {allowed}"):
            call()


@pytest.mark.parametrize("name", ("weight", "bias"))
def test_mixed_dtypes_are_refused_by_name(name):
    given = arguments(**{name: arguments(torch.float16)[name]})
    for call in list(calls(given))[: 1 if name == "bias" else 2]:
        with pytest.raises(ValueError, match=f"^{name} must be one of float32, got float16"):
            call()


def test_other_positions_are_refused():
    for call in calls(arguments(positions=torch.ones(2, dtype=torch.int32, device="meta"))):
        with pytest.raises(ValueError, match="^positions must be one of int64, got int32"):
            call()


@pytest.mark.parametrize("name", ("x", "weight"))
def test_sizes_past_31_bits_are_refused(name):
    given = arguments(**{name: torch.empty(2**31 - 1, 8, device="meta")})
    with pytest.raises(ValueError, match=rf"^no size of {name} may pass 2147418112, got \[2147483647, 8\]"):
        next(calls(given))()
