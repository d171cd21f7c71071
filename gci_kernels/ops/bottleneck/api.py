"""The public bottleneck operations: what they take, what they check, and the one place that picks an implementation."""

import math

import torch
from torch import Tensor

from gci_kernels.impl import check_impl
from gci_kernels.ops.arguments import autocast, check_tensor, check_x, without_autocast
from gci_kernels.ops.attention import Sequence
from gci_kernels.ops.attention.api import check_heads, check_sequence
from gci_kernels.ops.bottleneck import philox, reference
from gci_kernels.ops.bottleneck.autograd import bottleneck
from gci_kernels.ops.bottleneck.plan import choose_plan
from gci_kernels.ops.transforms import transformed


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
            generator whose seed comes from torch's; no mask is stored.
        impl: "auto", "reference", "aten", "native" (C++) or "triton"; an explicit one that cannot run raises.

    Returns:
        [..., out], x's dtype.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, what was given and what is allowed.
    """
    check_impl(impl)
    x, weight, bias = autocast(x, weight, bias)
    _check_linear(x, weight, bias, A, B, scaling, dropout_p)
    formula, seed = _formula(impl, dropout_p)
    if formula:
        return without_autocast(reference.lora_linear)(x, weight, bias, A, B, scaling, dropout_p, seed)
    plan = choose_plan(
        impl, tokens=x.numel() // x.shape[-1], dtype=x.dtype, device_type=x.device.type, mixer="identity"
    )
    nothing = (None, None, None)
    return bottleneck(x, weight, bias, A, B, *nothing, seed, "identity", [], scaling, dropout_p, plan.key)[0]


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
    check_impl(impl)
    x, weight, bias = autocast(x, weight, bias)
    _check_linear(x, weight, bias, A, B, scaling, dropout_p)
    _check_experts(x, A, router, top_k)
    top_k = router.shape[0] if top_k is None else top_k
    formula, seed = _formula(impl, dropout_p)
    if formula:
        operands = (x, weight, bias, A, B, router)
        return without_autocast(reference.loramoe_linear)(*operands, scaling, top_k, dropout_p, seed)
    plan = choose_plan(impl, tokens=x.numel() // x.shape[-1], dtype=x.dtype, device_type=x.device.type, mixer="gate")
    tensors = (x, weight, bias, A, B, router, None, None, seed)
    y, *_, gates = bottleneck(*tensors, "gate", [top_k], scaling, dropout_p, plan.key)
    return y, gates


def alora_linear(
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
    check_impl(impl)
    x, weight, bias = autocast(x, weight, bias)
    _check_linear(x, weight, bias, A, B, scaling, dropout_p)
    segments = _check_attention(x, A, qkv, num_heads, sequence, past)
    formula, seed = _formula(impl, dropout_p)
    if formula:
        return without_autocast(reference.alora_linear)(
            x, weight, bias, A, qkv, B, num_heads, residual, scaling, segments, past, dropout_p, seed
        )
    plan = choose_plan(
        impl, tokens=x.numel() // x.shape[-1], dtype=x.dtype, device_type=x.device.type, mixer="attention"
    )
    tensors = (x, weight, bias, A, B, qkv, segments, past, seed)
    y, *_, kv = bottleneck(*tensors, "attention", [num_heads, int(residual)], scaling, dropout_p, plan.key)
    return y, kv


def _formula(impl: str, dropout_p: float) -> tuple[bool, Tensor | None]:
    """Whether the formula runs, and dropout's seed; None: there is no dropout, or it is PyTorch's."""
    seen = transformed()
    formula = seen or impl == "reference"
    theirs = seen or formula and torch.compiler.is_compiling()  # a graph cannot hold what the seed's value decides
    return formula, philox.draw_seed() if dropout_p and not theirs else None


def _check_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, dropout_p: float
) -> None:
    check_x(x)
    check_tensor("A", A, (None, x.shape[-1]), x, same_dtype=False)
    if A.shape[0] < 1:
        raise ValueError(f"A must have r >= 1 rows, got {list(A.shape)}")
    check_tensor("B", B, (None, A.shape[0]), x, same_dtype=False)
    if weight is not None:
        check_tensor("weight", weight, (B.shape[0], x.shape[-1]), x, same_dtype=True)
    if bias is not None:
        if weight is None:
            raise ValueError("bias must be None where weight is None: the adapter's update alone has no bias")
        check_tensor("bias", bias, (B.shape[0],), x, same_dtype=True)
    if not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling must be a number, got {type(scaling).__name__}")
    if not -math.inf < scaling < math.inf:  # torch.compile can follow that, where numbers are symbols, not isfinite
        raise ValueError(f"scaling must be finite, got {scaling}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")


def _check_experts(x: Tensor, A: Tensor, router: Tensor, top_k: int | None) -> None:
    check_tensor("router", router, (None, x.shape[-1]), x, same_dtype=False)
    experts = router.shape[0]
    if not 1 <= experts <= 256:
        raise ValueError(f"router must have 1 to 256 rows (num_experts), got {list(router.shape)}")
    if A.shape[0] % experts:
        raise ValueError(f"A must have num_experts*r rows: {A.shape[0]} is not a multiple of num_experts={experts}")
    if top_k is not None and not (isinstance(top_k, int) and 1 <= top_k <= experts):
        raise ValueError(f"top_k must be None or an integer in [1, num_experts={experts}], got {top_k}")


def _check_attention(
    x: Tensor, A: Tensor, qkv: Tensor, num_heads: int, sequence: Sequence | None, past: Tensor | None
) -> Tensor | None:
    """The sequence's segments, on x's device."""
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be [batch, time, in] or [time, in], got {list(x.shape)}")
    r = A.shape[0]
    check_heads(r, num_heads)
    check_tensor("qkv", qkv, (3 * r, r), x, same_dtype=False)
    batch, time = (1, *x.shape[:-1])[-2:]
    if past is not None:
        check_tensor("past", past, (batch, None, 2 * r), x, same_dtype=True)
    return check_sequence(sequence, batch, time, 0 if past is None else past.shape[1], x.device)
