"""The public bottleneck operations: what they take, what they check, and the one place that picks an implementation."""

import math
from collections.abc import Callable
from collections.abc import Sequence as Numbers
from typing import Any

import torch
from torch import Tensor

from gci_kernels.impl import check_impl
from gci_kernels.ops.arguments import autocast, check_tensor, check_x, new_record, without_autocast
from gci_kernels.ops.attention import Sequence
from gci_kernels.ops.attention.api import check_sequence
from gci_kernels.ops.bottleneck import autograd, mask, philox, reference
from gci_kernels.ops.bottleneck.mixer import Mixer, Output
from gci_kernels.ops.bottleneck.mixers import ATTENTION, GATE, IDENTITY
from gci_kernels.ops.bottleneck.operands import Operands, Settings
from gci_kernels.ops.bottleneck.plan import Plan, choose_plan, plan_for
from gci_kernels.ops.transforms import transformed

#: See :func:`adapted_linear`.
Share = Callable[[Any, Any], tuple[tuple[Tensor, Any] | None, Any]]

_REFERENCE = Plan(*["reference"] * len(Plan._fields))


def lora_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor,
    *, scaling: float, dropout_p: float = 0.0, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """A linear layer with a LoRA adapter: y = x @ W.T + b + scaling * dropout(x) @ A.T @ B.T (arXiv 2106.09685).

    Differentiable in x, weight, bias, A and B; a gradient is formed only for what needs one. Second derivatives are
    those of the formula, computed anew. Under autocast x, weight and bias are cast as torch.nn.functional.linear casts
    them. Deterministic for a given number of threads. Where torch.jit.trace, torch.export, torch.func or forward-mode
    differentiation sees the call, it is the formula in PyTorch's operations and its dropout, whatever `impl` says.

    Args:
        x: [..., in], any floating dtype and device. Rows that are not contiguous are copied once.
        weight: [out, in] in x's dtype and on its device; None: the adapter's update alone is returned.
        bias: [out] in x's dtype, or None.
        A: [r, in], any floating dtype; used in x's.
        B: [out, r], any floating dtype; used in x's.
        scaling: a finite number; lora_alpha / r in the paper.
        dropout_p: probability in [0, 1) with which an element of the adapter's x is dropped, the rest being scaled by
            1 / (1 - dropout_p). Applied whenever it is not 0: pass 0 in evaluation. Drawn from a counter-based
            generator whose seed comes from torch's. The mask is made again in backward; where the products are
            Triton's, a bit for each element of x is kept.
        impl: "auto", "reference", "aten", "native" (C++) or "triton"; an explicit one that cannot run raises.

    Returns:
        [..., out], x's dtype.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, what was given and what is allowed.
    """
    return _checked(Operands(x, weight, bias, A, B), IDENTITY, (), scaling, dropout_p, impl)[0]


def loramoe_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, router: Tensor,
    *, scaling: float, top_k: int | None = None, dropout_p: float = 0.0, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A linear layer with N LoRA experts and a router (LoRAMoE, arXiv 2312.09979).

    gates = softmax(x @ router.T) over the experts;
    y = x @ W.T + b + scaling * (gates * (dropout(x) @ A.T)) @ B.T, each gate multiplying its expert's r values.

    Experts are stacked expert-major in A and B. One dropout mask is shared by the experts (the published code draws one
    for each); the router sees x before dropout.

    Args:
        x, weight, bias, scaling, dropout_p, impl: as in :func:`lora_linear`.
        A: [N*r, in], any floating dtype; used in x's.
        B: [out, N*r], any floating dtype; used in x's.
        router: [N, in], any floating dtype; used in x's. N at most 256.
        top_k: keep each token's top_k largest gates, renormalised to sum 1 (of equal ones the lower expert's);
            None keeps all.

    Returns:
        y [..., out] in x's dtype, and gates [..., N] in float32 (float64 for float64 x), differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, what was given and what is allowed.
    """
    if top_k is None:
        top_k = router.shape[0] if isinstance(router, Tensor) and router.dim() else 1
    return _checked(Operands(x, weight, bias, A, B, router), GATE, (top_k,), scaling, dropout_p, impl)


def alora_linear(  # noqa: PLR0913  # what the method has, by name
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, qkv: Tensor, B: Tensor,
    *, num_heads: int, scaling: float, residual: bool = False, dropout_p: float = 0.0,
    sequence: Sequence | None = None, past: Tensor | None = None, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A linear layer with attention in its low-rank path (ALoRA, arXiv 2405.17830).

    z = dropout(x) @ A.T and [q | k | v] = z @ qkv.T; o is q's causal multi-head attention to k and v, within x's own
    sequences; y = x @ W.T + b + scaling * o @ B.T, or of o + z. Only the paper's abstract was at hand ("a multi-head
    attention module upon LoRA, facilitating direct information transfer from preceding tokens to the current one"), so
    this reading of it is ours. It is not PEFT's Activated LoRA, which shares the letters.

    Args:
        x: [batch, time, in] or [time, in]; else as in :func:`lora_linear`, like weight, bias, scaling, dropout_p, impl.
        A: [r, in], any floating dtype; used in x's. r at most 256.
        qkv: [3r, r], any floating dtype; used in x's.
        B: [out, r], any floating dtype; used in x's.
        num_heads: a divisor of r; r / num_heads at most 64.
        residual: use o + z in place of o.
        sequence: what x's rows are: padding, packed sequences, how many tokens came before; None: each is one sequence.
        past: [batch, past, 2r] in x's dtype, what earlier calls returned as `kv`, joined; None at the start. It gets no
            gradient.

    Returns:
        y [..., out] in x's dtype, and kv [batch, time, 2r]: k and v of x's tokens, for a later call's `past`; without a
        gradient.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, what was given and what is allowed.
    """
    numbers = (num_heads, int(residual))
    operands = Operands(x, weight, bias, A, B, qkv, None, past)
    return _checked(operands, ATTENTION, numbers, scaling, dropout_p, impl, sequence)


def bottleneck_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, weights: Tensor | None = None,
    *, mixer: Mixer, settings: Numbers[int] = (), scaling: float, dropout_p: float = 0.0, impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A linear layer with any adapter of the form y = x @ W.T + b + scaling * mix(dropout(x) @ A.T) @ B.T.

    Args:
        x, weight, bias, A, scaling, dropout_p, impl: as in :func:`lora_linear`.
        B: [out, columns] as the mixer declares from A's and the weights' rows; any floating dtype, used in x's.
        weights: the mixer's own, any floating dtype, used in x's; [n, in] where they join `project`; None without.
        mixer: a registered one.
        settings: the mixer's own numbers.

    Returns:
        y [..., out] in x's dtype, and the mixer's output, None where it declares none.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, what was given and what is allowed.
    """
    numbers = tuple(settings)
    if any(type(number) is not int for number in numbers):
        raise TypeError(f"settings must be integers, got {numbers}")
    y, output = _checked(Operands(x, weight, bias, A, B, weights), mixer, numbers, scaling, dropout_p, impl)
    return y, None if mixer.output is Output.NONE else output


def _checked(
    operands: Operands, mixer: Mixer, numbers: tuple[int, ...], scaling: float, dropout_p: float, impl: str,
    sequence: Sequence | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op on arguments that a user gave."""
    check_impl(impl)
    x, weight, bias = autocast(*operands[:3])
    t = operands._replace(x=x, weight=weight, bias=bias)
    A, B, weights, past = t.A, t.B, t.weights, t.past
    _check_linear(t, scaling, dropout_p)
    if mixer.check is not None:
        mixer.check(x, A, weights, numbers)
    elif weights is not None:
        check_tensor("weights", weights, (None, x.shape[-1] if mixer.joins else None), x, same_dtype=False)
    columns = mixer.columns(A.shape[0], 0 if weights is None else weights.shape[0])
    check_tensor("B", B, (None, columns), x, same_dtype=False)
    if sequence is not None or past is not None:
        t = t._replace(segments=_segments(x, A, sequence, past))
    return adapted_linear(t, mixer, numbers, scaling, dropout_p, impl)


def adapted_linear(
    operands: tuple[Tensor | None, ...], mixer: Mixer, numbers: tuple[int, ...], scaling: float, dropout_p: float,
    impl: str, share: Share | None = None, layer: Any = None,
) -> tuple[Tensor, Any]:  # fmt: skip
    """The op for layers, whose parameters fit each other; x is checked in full only if a quick comparison fails.

    Args:
        operands: those of :class:`~gci_kernels.ops.bottleneck.operands.Operands`, the seed None; segments, if any, on
            x's device.
        mixer, numbers, scaling, dropout_p, impl: as in :func:`bottleneck_linear`.
        share, layer: share(layer, (operands, mixer, numbers, scaling, dropout_p, impl)) is asked in eager mode with
            gradients, where several layers may be computed together: it returns what this function is to return, or
            None, and what the graph is to keep until its backward, or None.

    Returns:
        y, and the mixer's output, None or an empty tensor where it declares none.
    """
    t = new_record(Operands, operands)
    x, weight, bias, A, *_ = t
    formula, compiling, kept = transformed(), torch.compiler.is_dynamo_compiling(), None
    alone = formula or compiling or impl == "reference" or dropout_p or weight is None
    if share is not None and not alone and torch.is_grad_enabled():
        made, kept = share(layer, (operands, mixer, numbers, scaling, dropout_p, impl))
        if made is not None:
            return made
    device = x.device
    usual = x.dtype is (x if weight is None else weight).dtype and x.shape[-1:] == A.shape[1:] and device == A.device
    if not usual or device.type == "meta" or torch.is_autocast_enabled(device.type) or not x.is_floating_point():
        x, weight, bias = autocast(x, weight, bias)
        t = t._replace(x=x, weight=weight, bias=bias)
        _check_linear(t, scaling, dropout_p)
    if formula or impl == "reference":
        # In a compiled graph or under a transform, dropout is PyTorch's own, which both know.
        if dropout_p and not (formula or compiling):
            t = t._replace(seed=philox.draw_seed(device))
        settings = Settings(mixer.name, numbers, scaling, dropout_p, _REFERENCE)
        return without_autocast(lambda _: reference.bottleneck(t, settings, mixer))(x)
    choose = choose_plan if compiling else plan_for
    tokens = x.numel() // x.shape[-1]
    plan = choose(impl, tokens, x.dtype, device.type, mixer.name, device=device, dropout=dropout_p > 0)
    if dropout_p:
        t = t._replace(seed=mask.draw(x, dropout_p, plan))
    settings = new_record(Settings, (mixer.name, numbers, scaling, dropout_p, plan))
    y, output = autograd.run(t, settings, compiling)
    if kept is not None:
        autograd.keep_until_backward(y, kept)
    return y, output


def _check_linear(t: Operands, scaling: float, dropout_p: float) -> None:
    x, weight, bias, A, B = t[:5]
    check_x(x)
    check_tensor("A", A, (None, x.shape[-1]), x, same_dtype=False)
    if A.shape[0] < 1:
        raise ValueError(f"A must have r >= 1 rows, got {list(A.shape)}")
    check_tensor("B", B, (None, None), x, same_dtype=False)
    if weight is not None:
        check_tensor("weight", weight, (B.shape[0], x.shape[-1]), x, same_dtype=True)
    if bias is not None:
        if weight is None:
            raise ValueError("bias must be None where weight is None: the adapter's update alone has no bias")
        check_tensor("bias", bias, (B.shape[0],), x, same_dtype=True)
    if not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling must be a number, got {type(scaling).__name__}")
    if not -math.inf < scaling < math.inf:  # not isfinite, which torch.compile cannot trace for symbolic numbers
        raise ValueError(f"scaling must be finite, got {scaling}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")


def _segments(x: Tensor, A: Tensor, sequence: Sequence | None, past: Tensor | None) -> Tensor | None:
    """The sequence's segments, on x's device."""
    batch, time = (1, *x.shape[:-1])[-2:]
    if past is not None:
        check_tensor("past", past, (batch, None, 2 * A.shape[0]), x, same_dtype=True)
    return check_sequence(sequence, batch, time, 0 if past is None else past.shape[1], x.device)
