"""Products with frozen weights on a CPU, through oneDNN.

In float32, torch gives a linear layer to MKL, which shares a product of few rows badly among threads. On two cores of
an AMD EPYC, with 14 to 400 rows of 576, oneDNN was 1.1 to 2 times as fast, and attribution is made of such products.
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _FrozenLinear(torch.autograd.Function):
    """x [.., in] -> x @ weight.T + bias [.., out], where neither weight [out, in] nor bias [out] wants a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        return _linear(dy.contiguous(), ctx.weight.t(), None), None, None


class OneDNNLinears(TorchFunctionMode):
    """While entered, linear layers with frozen float32 weights on a CPU are computed by oneDNN, if torch has it."""

    def __init__(self):
        super().__init__()
        self.available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear and self.available and not kwargs:
            x, weight, bias = args if len(args) == 3 else (*args, None)
            if _suitable(x, weight, bias):
                return _FrozenLinear.apply(x.contiguous(), weight, bias)
        return func(*args, **(kwargs or {}))


def _suitable(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    plain = all(
        type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and tensor.dtype == torch.float32
        for tensor in (x, weight, bias)
        if tensor is not None
    )
    wanted = weight.requires_grad or (bias is not None and bias.requires_grad)
    return plain and weight.dim() == 2 and x.numel() > 0 and not wanted
