"""The frozen linear layers of a patched model, whose instances change their class to run `ops.frozen_linear`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from gci_kernels.class_swap import Swapped, give_class, subclass
from gci_kernels.ops.frozen_linear import frozen_linear, takes

if TYPE_CHECKING:  # what the mixin is mixed with
    _Layer = nn.Linear
else:
    _Layer = object


class UpcastLinear(Swapped, _Layer):
    """Mixin for a torch.nn.Linear: float32 products where they are faster than the library's, else its own forward."""

    def forward(  # type: ignore[override]  # class_swap.subclass gives own_forward
        self, own_forward: Callable[..., Tensor], input: Tensor
    ) -> Tensor:
        if takes(input, self.weight, self.bias):
            return frozen_linear(input, self.weight, self.bias)
        return own_forward(self, input)


def swap_all(model: nn.Module) -> None:
    """Every layer that is a plain torch.nn.Linear without a gradient; others are left as they are."""
    for module in model.modules():
        if type(module) is nn.Linear and not any(parameter.requires_grad for parameter in module.parameters()):
            give_class(module, subclass(nn.Linear, UpcastLinear))


def swap_back(model: nn.Module) -> None:
    """Undoes :func:`swap_all`."""
    for module in model.modules():
        if isinstance(module, UpcastLinear):
            give_class(module, module._gci_parts[0])
