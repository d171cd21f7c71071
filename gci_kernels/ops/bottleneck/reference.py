"""The bottleneck adapters as their formula, in plain PyTorch: the oracle of every test, in any floating dtype."""

import torch.nn.functional as F
from torch import Tensor

from gci_kernels.ops.bottleneck import philox
from gci_kernels.ops.bottleneck.by_autograd import apply
from gci_kernels.ops.bottleneck.mixer import Mixer, Output
from gci_kernels.ops.bottleneck.operands import Operands, Settings, make_call
from gci_kernels.ops.transforms import transformed


def bottleneck(operands: Operands, settings: Settings, mixer: Mixer) -> tuple[Tensor, Tensor]:
    """y = x @ W.T + b + scaling * mix(dropout(x) @ A.T) @ B.T, and the mixer's output (an empty tensor for none).

    An output that the mixer declares constant has no gradient, unless a transform differentiates all there is.
    """
    x, weight, bias, weights = operands.x, operands.weight, operands.bias, operands.weights
    A, B, weights = operands.A.to(x.dtype), operands.B.to(x.dtype), None if weights is None else weights.to(x.dtype)
    rows = 0 if weights is None else weights.shape[0]
    seen = F.linear(x, weights) if mixer.joins and weights is not None else weights
    h = F.linear(_dropped(x, settings.dropout_p, operands.seed), A)
    u, output = apply(mixer, h, seen, make_call(operands, settings, x.dtype, "reference"), rows)
    y = settings.scaling * F.linear(u, B)
    if weight is not None:
        y = F.linear(x, weight, bias) + y
    return y, output.detach() if mixer.output is Output.CONSTANT and not transformed() else output


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if not p:
        return x
    if seed is None:  # transforms cannot see into an operator of ours
        return F.dropout(x, p)
    keep = philox.keep_mask(x.numel() // x.shape[-1], x.shape[-1], p, seed, x.device)
    return x * keep.view(x.shape) / (1 - p)
