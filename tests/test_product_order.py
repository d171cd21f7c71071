"""The order of expand's two products in the library's form: which is more exact, and which is taken where."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gci_kernels.accuracy import relative_error
from gci_kernels.ops.bottleneck import aten

TOKENS, RANK, DEPTH, WIDTH = 130, 9, 67, 45
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def operands(dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """u, m, x, w and bias of a layer whose adapter adds a hundredth of its output."""
    shapes = (TOKENS, RANK, 0.01), (RANK, WIDTH, RANK**-0.5), (TOKENS, DEPTH, 1.0), (DEPTH, WIDTH, DEPTH**-0.5)
    made = [torch.randn(rows, columns, dtype=torch.float64) * scale for rows, columns, scale in shapes]
    return [t.to(device, dtype) for t in (*made, torch.randn(WIDTH, dtype=torch.float64))]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_small_adapter_is_more_exact_with_its_product_first(dtype):
    u, m, x, w, bias = operands(dtype)
    truth = u.double() @ m.double() + x.double() @ w.double()
    adapter_first = relative_error(F.linear(u, m.t()).addmm_(x, w), truth)
    assert adapter_first < 0.85 * relative_error(F.linear(x, w.t()).addmm_(u, m), truth)
    # Nothing can be nearer than the exact sum rounded once.
    assert adapter_first < 1.05 * relative_error(truth.to(dtype), truth)
    # A bias as large as the output is rounded along with the first product, whichever that is.
    truth += bias.double()
    adapter_first = relative_error(F.linear(u, m.t(), bias).addmm_(x, w), truth)
    assert adapter_first < 1.05 * relative_error(F.linear(x, w.t(), bias).addmm_(u, m), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_the_base_product_goes_first_on_a_cpu_in_16_bits_alone(device, dtype):
    """A device that is no CPU, here the one without data, is taken for a GPU."""
    depths = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                depths.append(args[-1].shape[0])
            return func(*args, **(kwargs or {}))

    u, m, x, w, bias = operands(dtype, device)
    base_first = device == "cpu" and dtype in (torch.bfloat16, torch.float16)
    for added in (bias, None):
        depths.clear()
        with Products():
            aten.expand(u, m, x, w, added)
        assert depths == ([DEPTH, RANK] if base_first else [RANK, DEPTH])
