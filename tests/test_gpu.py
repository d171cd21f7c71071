"""What needs a CUDA device: every implementation against float64 on it, and the same bits twice."""

import pytest
import torch

from gci_kernels.verify import CASES, make_inputs, run_case, verify

pytestmark = pytest.mark.gpu


def test_every_implementation_against_float64():
    checks = [check for group in verify("cuda") for check in group]
    assert {check.impl for check in checks} == {"aten", "triton"}
    assert not [check for check in checks if not check.passed]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_gives_the_same_bits_twice(case, dtype):
    tensors = make_inputs(case, dtype, "cuda")
    first, second = (run_case(case, tensors, "triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
