"""The self check of the Triton kernels, interpreted: it passes right kernels and stops wrong ones."""

import os
import subprocess
import sys
import textwrap

import torch

from gci_kernels import hardware
from gci_kernels.hardware import self_check


def interpreted(code: str) -> str:
    """What `code` prints where the kernels are interpreted: a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_self_check_passes_right_kernels_and_stops_wrong_ones():
    """Interpreted, in float32 and float16: every kernel right, then each with a small fault of its own."""
    shown = interpreted(
        """
        import importlib, torch
        from dataclasses import replace
        from gci_kernels import hardware
        from gci_kernels.hardware import Shape, kernels, self_check
        from gci_kernels.ops.bottleneck import config
        from gci_kernels.ops.bottleneck import triton as stages
        from gci_kernels.ops.gate import triton as gate
        from gci_kernels.ops.row_linear import triton as row_linear

        # dY read once for two products: at this size, only where it is asked for.
        small = config.ReduceConfig(16, 16, 16, 2, 4, 1)
        odd, even = self_check.ODD, Shape(48, 64, 48, 16, 2, 2)

        def failed(kernel, *shapes):
            checks = list(self_check.check_kernel(
                kernel, torch.device("cpu"), dtypes=(torch.float32, torch.float16), shapes=shapes))
            assert len(checks) > 10 * len(shapes), len(checks)
            return sorted({f"{check.tensor}: {check.dtype}" for check in checks if not check.passed})

        reduce, both = kernels.get_launch("project_reduce")
        choose = lambda tokens, *_: small if tokens == 48 else None
        kernels.LAUNCHES["project_reduce"] = reduce, replace(both, choose=choose)
        for kernel in hardware.names("triton"):
            print("right", kernel, failed(kernel, odd, even))

        def unwritten(right):
            def wrong(*args, **kwargs):
                result = right(*args, **kwargs)
                return torch.where(torch.arange(result.shape[0])[:, None] == 0, torch.empty_like(result), result)
            return wrong

        def scaled(right):
            return lambda *args, **kwargs: tuple(r * 1.01 for r in right(*args, **kwargs))

        def rounded(right):
            return lambda *args, **kwargs: right(*args, **kwargs).half().float()

        def noisy(right):
            state = iter(range(10**6))
            def wrong(*args, **kwargs):
                result = right(*args, **kwargs)
                result[0, 0] *= 1 + (next(state) % 3) * 2**-8
                return result
            return wrong

        def shifted(right):
            return lambda positions, rows: right(positions, rows).roll(1)

        def by_position(right):  # as if the active rows came in the order of W's
            return lambda positions, rows: right(positions.sort().values, rows)

        faults = [
            (stages, "project", rounded), (stages, "expand", unwritten), (stages, "reduce", noisy),
            (stages, "project_reduce", scaled), (stages, "dropout", unwritten), (gate, "forward", scaled),
            (gate, "backward", scaled), (row_linear, "_source", shifted), (row_linear, "_source", by_position),
            (row_linear, "dx", unwritten),
        ]
        owners = {gate: "gate", row_linear: "row_linear"}
        for module, name, fault in faults:
            right = getattr(module, name)
            setattr(module, name, fault(right))
            kernel = owners.get(module, "reduce" if name == "project_reduce" else name)
            print("wrong", name, failed(kernel, even if name == "project_reduce" else odd))
            setattr(module, name, right)
        """
    )
    lines = shown.splitlines()
    assert len(lines) == len(hardware.names("triton")) + 10, shown
    for line in lines:
        verdict, _, names = line.split(maxsplit=2)
        assert (names == "[]") == (verdict == "right"), line
    told = {line.split()[1]: line for line in lines if line.startswith("wrong")}
    assert "'dB, one reading: float16'" in told["project_reduce"] and "'dA: " not in told["project_reduce"]
    assert "twice" in told["reduce"] and "'kept: float32'" in told["dropout"] and "'gates: float32'" in told["forward"]
    assert "'du: float16'" in told["project"], "a sum rounded to 16 bits is not what other stages are told it is"


def test_poison_is_there_meanwhile_and_gone_after():
    torch.use_deterministic_algorithms(False)
    with self_check.poisoned():
        assert torch.empty(3).isnan().all() and torch.empty(3, dtype=torch.int32).eq(2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
