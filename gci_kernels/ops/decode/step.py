"""Decoding steps, each made once for some adapters and cached for as long as their tensors live."""

import functools
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gci_kernels.ops import transforms
from gci_kernels.ops.decode import cuda, native
from gci_kernels.ops.decode.group import Group
from gci_kernels.ops.decode.plan import DecodePlan, choose_decode

AnyStep = native.Step | cuda.Step
# Key -> the state that the step was made for, and the step; None: no kernel takes it. The key consists of the tensors'
# ids and the tokens of each adapter. An entry is removed when one of its tensors is deleted, before another object can
# get its id. The state is everything else that the step depends on: addresses, sizes and settings. Every call compares
# it, for it may change while the tensors stay. Nothing is stored on the tensors or modules, nothing keeps them alive.
_steps: dict[tuple, tuple[list, AnyStep | None]] = {}
_keys: dict[int, tuple[weakref.ref, set[tuple]]] = {}  # by the id of a tensor: the keys that contain it
# Threads may share tensors. Reentrant, because a tensor may be garbage-collected while its thread stores a step.
_lock = threading.RLock()


class GraphStep:
    """Stands for a step while torch.compile traces: calls the operator that finds the step when the graph runs.

    Args:
        weight, bias: [out, in] and [out] or None; weight None: y comes with the base product.
        groups: the adapters and their tokens.
        rows: which rows of x the groups' tokens are; None: all of them belong to the only group.
    """

    def __init__(
        self, weight: Tensor | None, bias: Tensor | None, groups: Sequence[Group], rows: Sequence[int] | None
    ) -> None:
        self.base, self.groups = (weight, bias), groups
        # Without rows the number of tokens stays open, so that one graph serves any number.
        self.rows, self.counts = ([], []) if rows is None else (list(rows), [g.count for g in groups])

    def run(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """y [..., out] for x [..., in], a new tensor; the y that is given, [..., out], is not written to."""
        groups = self.groups
        return torch.ops.gci_kernels.decode(
            x, *self.base, y, [g.A for g in groups], [g.B for g in groups], [g.router for g in groups],
            [g.scaling for g in groups], [g.top_k or g.experts for g in groups], self.rows, self.counts,
        )  # fmt: skip

    def attend(self, x: Tensor, y: Tensor | None, kv: Tensor, past: Tensor, segments: Tensor | None) -> Tensor:
        """:meth:`run` with attention; kv, past and segments as native.Step.attend and cuda.Step.attend take them."""
        groups = self.groups
        return torch.ops.gci_kernels.decode_attend(
            x, *self.base, y, [g.A for g in groups], [g.B for g in groups], [g.qkv for g in groups], kv, past, segments,
            [g.scaling for g in groups], [g.num_heads for g in groups], [g.residual for g in groups],
            self.rows, self.counts,
        )  # fmt: skip


def find_step(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: Sequence[Group], rows: tuple[int, ...] | None = None
) -> AnyStep | GraphStep | None:
    """The step for x, which the caller then runs; None if no kernel takes it.

    `step.run(x, y)` returns the adapted layer's output [..., out] in x's dtype: with y None a new tensor that includes
    the base product; else y, which holds the base product and is added to in place (not so in a graph of
    torch.compile). `step.attend(x, y, kv, past, segments)` is the same for ALoRA: see native.Step and cuda.Step. No
    gradients flow.

    Every layer calls this in every decoding step, so a cached step is found within this function, without another
    Python call, and only what the choice depends on is checked.

    Args:
        x: [..., in], float32, bfloat16 or float16, on a CPU or a GPU; at most MAX_DECODE_TOKENS rows.
        weight, bias: the base layer's, [out, in] and [out] or None, in x's dtype; weight None: the caller has y.
        groups: the adapters and their tokens; the tokens count from 0 and follow one another.
        rows: of x, seen as [tokens, in]: those of the groups' tokens, in order, and then those of no group; None: all
            rows, of the only group.
    """
    if is_dynamo_compiling():
        return None if plan_step(x, weight, bias, groups) is None else GraphStep(weight, bias, groups, rows)
    if transforms.dispatch_mode_depth():
        return None  # the mode would not see the kernel's work
    parts: list = [x.dtype, id(weight), id(bias), rows]
    state: list = [x.shape[-1], x.device, groups[0].A.dtype]
    if weight is not None:
        state.append(weight.data_ptr())
    if bias is not None:
        state.append(bias.data_ptr())
    for A, B, scaling, first, count, router, top_k, qkv, num_heads, residual in groups:
        parts += id(A), id(B), first, count, id(router), id(qkv)
        state += scaling, A.data_ptr(), A.nbytes, B.data_ptr()  # the sizes of B and of qkv follow from that of A
        if router is not None:
            state += router.data_ptr(), router.nbytes, top_k
        if qkv is not None:
            state += qkv.data_ptr(), num_heads, residual
    key = tuple(parts)
    cached = _steps.get(key)
    if cached is not None and cached[0] == state:
        return cached[1]
    step = _make_step(x, weight, bias, groups, rows)
    if step is not None or x.device.type == "cpu":  # on a GPU None may be temporary: a graph is being captured
        tensors = [t for t in (weight, bias) if t is not None]
        _store(key, (state, step), tensors + [t for group in groups for t in group.tensors])
    return step


def _store(key: tuple, entry: tuple[list, AnyStep | None], tensors: list[Tensor]) -> None:
    """Cache `entry` until one of `tensors` is deleted."""
    with _lock:
        _steps[key] = entry
        for tensor in tensors:
            tensor_id = id(tensor)
            if tensor_id not in _keys:
                _keys[tensor_id] = weakref.ref(tensor, functools.partial(_evict, tensor_id)), set()
            _keys[tensor_id][1].add(key)


def _evict(tensor_id: int, _: weakref.ref) -> None:
    """Remove the entries of a tensor that is being deleted."""
    with _lock:
        for key in _keys.pop(tensor_id)[1]:
            _steps.pop(key, None)


def plan_step(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: Sequence[Group]) -> DecodePlan | None:
    """The plan for x, weight, bias and groups as :func:`find_step` takes them; None if no kernel takes them."""
    dtype = groups[0].A.dtype
    if x.shape[-1] != groups[0].A.shape[1]:
        return None  # the library's product raises the error
    if not all(_is_plain(t, dtype, x.device) for group in groups for t in group.tensors):
        return None
    if not all(t is None or _is_plain(t, x.dtype, x.device) for t in (weight, bias)):
        return None
    return plan_groups(groups, x.numel() // x.shape[-1], x.dtype, x.device)


def _is_plain(t: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels may read `t` by its address alone: not a subclass, which may be sharded or quantised."""
    return type(t) in transforms.PLAIN and t.is_contiguous() and t.dtype == dtype and t.device == device


def plan_groups(groups: Sequence[Group], tokens: int, dtype: torch.dtype, device: torch.device) -> DecodePlan | None:
    """:func:`choose_decode` for x [tokens, in] on `device` and adapters whose tensors are plain and contiguous."""
    return choose_decode(
        tokens=tokens, columns=max(g.columns for g in groups), experts=max(g.experts for g in groups),
        dtype=dtype, adapter_dtype=groups[0].A.dtype, device_type=device.type, device=device,
        head=None if groups[0].qkv is None else max(g.A.shape[0] // g.num_heads for g in groups),
    )  # fmt: skip


def _shapes_match(weight: Tensor | None, bias: Tensor | None, groups: Sequence[Group]) -> bool:
    """Whether all shapes fit one another: a kernel would read past the end of a tensor that is too small."""
    width, out = groups[0].A.shape[1], groups[0].B.shape[0]
    for g in groups:
        columns = g.A.shape[0]
        if g.A.shape != (columns, width) or g.B.shape != (out, columns):
            return False
        if g.router is not None and (g.router.shape[1:] != (width,) or columns % g.router.shape[0]):
            return False
        if g.qkv is not None and (g.qkv.shape != (3 * columns, columns) or columns % g.num_heads):
            return False
    return (weight is None or weight.shape == (out, width)) and (bias is None or bias.shape == (out,))


def _make_step(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: Sequence[Group], rows: Sequence[int] | None
) -> AnyStep | None:
    """A new step, None if no kernel takes it."""
    if plan_step(x, weight, bias, groups) is None or not _shapes_match(weight, bias, groups):
        return None
    if rows is None:
        rows = range(x.numel() // x.shape[-1])
    step_class = cuda.Step if x.device.type == "cuda" else native.Step
    return step_class(groups, rows, x.dtype, weight, bias)
