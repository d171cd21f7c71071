"""When an adapter may take over its base layer's product, and what both tuners do with the answer."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gci_kernels.ops.decode import MAX_TOKENS, has_kernels

# What nn.Module.__call__ would run around forward; a fused layer reads the weight and calls neither.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def obstacle(module: nn.Module) -> str | None:
    """Why `module`'s product must stay its own call, or None where a kernel may read its weight and bias instead."""
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is not torch.nn.Linear"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    if any(getattr(module, name) for name in _HOOKS):
        return "it has hooks"
    if type(module.weight) not in (nn.Parameter, Tensor):
        return f"its weight is a {type(module.weight).__name__}"
    return None


def combine(
    base: nn.Module, x: Tensor, names: Iterable[str], update: Callable[[str, Tensor | None, Tensor | None], Tensor]
) -> Tensor:
    """base(x) plus the updates of all named adapters; `update(name, weight, bias)` includes the base where it can.

    The first adapter is fused with the base product if nothing stands against it, the others are added.
    """
    y = None if obstacle(base) is None else base(x)
    for name in names:
        if y is None:
            y = update(name, base.weight, base.bias)
        else:
            y = y + update(name, None, None).to(y.dtype)
    return base(x) if y is None else y


def decodes(base: nn.Module, x: Tensor) -> bool:
    """Whether x is a decoding step that kernels may take: a few tokens, no gradients, a base product to add to."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.numel() > MAX_TOKENS * x.shape[-1]:
        return False
    if not has_kernels(x.dtype, x.device.type):
        return False
    return obstacle(base) is None and base.weight.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type)


def decoded(
    base: nn.Module, x: Tensor, names: Iterable[str], add: Callable[[Tensor, str], bool],
    update: Callable[[str, Tensor | None, Tensor | None], Tensor],
) -> Tensor:  # fmt: skip
    """:func:`combine` for a decoding step: `add(y, name)` adds an adapter's update to y where a kernel can."""
    y = F.linear(x, base.weight, base.bias)
    for name in names:
        if not add(y, name):
            y = y + update(name, None, None).to(y.dtype)
    return y


def matmul_dtype(module: nn.Module) -> torch.dtype | None:
    """The floating dtype of the layer's weight, or None where it has none (quantised)."""
    weight = getattr(module, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else None
