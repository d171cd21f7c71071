"""Gives the frozen linear layers of a patched model another class, which runs `ops.frozen_linear`."""

from collections.abc import Callable

from torch import Tensor, nn

from gci_kernels.class_swap import Swapped, add_mixin
from gci_kernels.ops.frozen_linear import frozen_linear, takes


class UpcastLinear(Swapped):
    """Mixin for a torch.nn.Linear that computes in float32 where that is faster than the library's 16-bit product."""

    def forward(self, own_forward: Callable[..., Tensor], input: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the same dtype; the layer's own forward where the op does not take x."""
        if takes(input, self.weight, self.bias):
            return frozen_linear(input, self.weight, self.bias)
        return own_forward(self, input)


def swap_all(model: nn.Module) -> None:
    """Gives every plain torch.nn.Linear of `model` whose parameters are frozen the class :class:`UpcastLinear`."""
    for module in model.modules():
        if type(module) is nn.Linear and not any(parameter.requires_grad for parameter in module.parameters()):
            add_mixin(module, UpcastLinear)
