"""Where PyTorch records or transforms operations, and only its own may be called.

A kernel of ours is a single operator, or none at all, to torch.jit.trace, torch.export, torch.func and forward-mode
differentiation: they could not look into it, and some would take its result for a constant. There the formulas in the
modules called reference.py run instead, whatever `impl` says.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Asked in every call of a layer, so they are looked up once. torch.compile takes their answers for constants.
_tracing_state = torch._C._get_tracing_state
_functorch_depth = torch._C._functorch.get_dynamic_layer_stack_depth
_is_exporting = torch.compiler.is_exporting
_dispatch_depth = torch._C._len_torch_dispatch_stack

# torch.jit.trace warns wherever Python looks at a size. In this package that is to check arguments.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module="gci_kernels")


def transformed() -> bool:
    """Whether torch.jit.trace, torch.export, torch.func or forward-mode differentiation sees what runs now.

    Not so under torch.compile alone, which knows our operators.
    """
    return _tracing_state() is not None or _functorch_depth() > 0 or forward_ad._current_level >= 0 or _is_exporting()


def under_dispatch_mode() -> bool:
    """Whether something looks at every operation as it runs: make_fx, FakeTensorMode, a counter of products."""
    return _dispatch_depth() > 0


def captured() -> bool:
    """Whether torch.jit.trace or torch.export makes a graph of what runs now, which outlives this call."""
    return _tracing_state() is not None or _is_exporting()


def differentiated_again(*d_outputs: Tensor | None) -> bool:
    """In a backward: whether its gradients will have gradients (create_graph=True), or are formed for many at once."""
    return torch.is_grad_enabled() or _functorch_depth() > 0 or any(map(_is_batch, d_outputs))


def _is_batch(dy: Tensor | None) -> bool:
    """Whether torch.autograd.grad(is_grads_batched=True) gave dy, which is no transform of torch.func."""
    return dy is not None and torch._C._functorch.is_legacy_batchedtensor(dy)


def plain_gradients(
    formula: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], d_outputs: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The gradients of `inputs` for those of the formula's outputs, None for zeros; any number of times differentiable.

    The inputs may be the same tensor: each has the gradient of its own place.
    """
    if any(map(_is_batch, d_outputs)):
        return _gradients_of_batch(formula, inputs, d_outputs)
    outputs, pull, *_ = torch.func.vjp(formula, *inputs)
    given = (torch.zeros_like(y) if dy is None else dy for y, dy in zip(outputs, d_outputs, strict=True))
    return pull(tuple(given))


def _gradients_of_batch(
    formula: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], d_outputs: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [t.view_as(t) if create else t.detach().requires_grad_() for t in inputs]
        outputs = formula(*own)
    pairs = [(y, dy) for y, dy in zip(outputs, d_outputs, strict=True) if dy is not None]
    found = torch.autograd.grad(
        [y for y, _ in pairs], own, [dy for _, dy in pairs], create_graph=create, materialize_grads=True
    )
    return tuple(found)
