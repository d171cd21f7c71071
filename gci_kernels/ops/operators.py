"""Registration of operators with PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("gci_kernels", "DEF")


def define(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any], derivative: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:  # fmt: skip
    """Register the operator gci_kernels::`schema`.

    Args:
        schema: its name, arguments and results, as torch.library.Library.define takes them.
        run: computes it, on any device.
        fake: makes results of the right shapes and dtypes, for torch.compile and fake tensors.
        derivative, setup_context: as torch.library.register_autograd takes them; None: autograd passes it over.
    """
    name = f"gci_kernels::{schema.partition('(')[0]}"
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_library)
    if derivative is not None:
        torch.library.register_autograd(name, derivative, setup_context=setup_context, lib=_library)


def no_derivative(op: str, remedy: str = "use impl='reference' where one is needed") -> Callable[..., None]:
    """The derivative of an operator that has none, which raises RuntimeError.

    Args:
        op: the operator's name, without "gci_kernels::".
        remedy: what the message tells the user to do.
    """

    def backward(ctx: Any, *d_outputs: Tensor | None) -> None:
        raise RuntimeError(f"gci_kernels::{op} has no derivative; {remedy}")

    return backward
