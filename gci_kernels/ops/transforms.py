"""Where PyTorch records or transforms operations, and only PyTorch's own operations may be called.

torch.jit.trace, torch.export, torch.func and forward-mode differentiation cannot look into our kernels: they see one
opaque operator, or take its result for a constant. There the formulas in the modules called reference.py run instead,
whatever `impl` says.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Every call of a layer calls these, so they are looked up once, and are C functions where there are any. torch.compile
# takes their results for constants.
_tracing_state = torch._C._get_tracing_state
_functorch_depth = torch._C._functorch.get_dynamic_layer_stack_depth

#: How many modes see every operation as it runs (make_fx, FakeTensorMode, a counter of products); 0: none.
dispatch_mode_depth: Callable[[], int] = torch._C._len_torch_dispatch_stack

#: In a backward: whether the graph is retained (retain_graph=True), so that the same backward may run again.
keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph

#: Types of a tensor that a kernel may read at its address. A subclass, fake or in shards, need not have one.
PLAIN = (Tensor, torch.nn.Parameter)

# torch.jit.trace warns wherever Python reads a size. This package reads sizes to check arguments.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module="gci_kernels")


def transformed() -> bool:
    """Whether torch.jit.trace, torch.export, torch.func or forward-mode differentiation sees what runs now.

    False under torch.compile alone, which knows our operators.
    """
    return (
        _tracing_state() is not None
        or _functorch_depth() > 0
        or forward_ad._current_level >= 0
        or torch.compiler._is_exporting_flag
    )


def captured() -> bool:
    """Whether torch.jit.trace or torch.export records what runs now in a graph that outlives this call."""
    return _tracing_state() is not None or torch.compiler._is_exporting_flag


def differentiated_again(*d_outputs: Tensor | None) -> bool:
    """In a backward: whether its gradients will be differentiated (create_graph=True) or are computed as a batch.

    `d_outputs`: the gradients that the backward was given, None for zeros.
    """
    return torch.is_grad_enabled() or _functorch_depth() > 0 or any(map(_is_batch, d_outputs))


def _is_batch(dy: Tensor | None) -> bool:
    """Whether dy comes from torch.autograd.grad(is_grads_batched=True), which is not a transform of torch.func."""
    return dy is not None and torch._C._functorch.is_legacy_batchedtensor(dy)


def plain_gradients(
    formula: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], inputs: dict[str, Tensor],
    d_outputs: Sequence[Tensor | None],
) -> dict[str, Tensor]:  # fmt: skip
    """The gradients of `inputs`, in PyTorch's own operations, which may be differentiated any number of times.

    Args:
        formula: takes `inputs` and returns a tuple of tensors.
        inputs: may hold the same tensor twice; each has the gradient of its own name.
        d_outputs: gradients of the formula's outputs, None for zeros.
    """
    if not inputs:
        return {}
    if not any(map(_is_batch, d_outputs)):
        outputs, vjp, *_ = torch.func.vjp(formula, inputs)
        dense = (torch.zeros_like(y) if dy is None else dy for y, dy in zip(outputs, d_outputs, strict=True))
        return vjp(tuple(dense))[0]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = {n: t.view_as(t) if create_graph else t.detach().requires_grad_() for n, t in inputs.items()}
        outputs = formula(leaves)
    pairs = [(y, dy) for y, dy in zip(outputs, d_outputs, strict=True) if dy is not None]
    options: Any = dict(create_graph=create_graph, materialize_grads=True)
    made = torch.autograd.grad([y for y, _ in pairs], list(leaves.values()), [dy for _, dy in pairs], **options)
    return dict(zip(inputs, made, strict=True))
