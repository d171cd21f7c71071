"""Steps that are made once for some adapters and used as long as their tensors are the same ones."""

import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gci_kernels.ops.decode import cuda, native
from gci_kernels.ops.decode.group import Group
from gci_kernels.ops.decode.plan import DecodePlan, choose_decode

AnyStep = native.Step | cuda.Step
# What a step belongs to -> what it was made of, and the step; None: there is no kernel for it. The key is made of the
# tensors' ids and of which tokens they are for; an entry goes when one of its tensors does, before its id can be
# another's. What else a step holds, addresses, sizes and settings, is compared in every call, for all of it may change
# while the tensors stay. Nothing is put on the tensors or their modules, and nothing keeps them alive.
_steps: dict[tuple, tuple[list, AnyStep | None]] = {}
_keys: dict[int, tuple[weakref.ref, set[tuple]]] = {}  # by the id of a tensor
# Threads may share the tensors. Reentrant, because a tensor can be collected while its thread keeps a step.
_lock = threading.RLock()


def _forget(tensor_id: int) -> None:
    with _lock:
        for key in _keys.pop(tensor_id, (None, ()))[1]:
            _steps.pop(key, None)


def find_step(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: Sequence[Group], rows: Sequence[int] | None
) -> AnyStep | None:
    """The step for x [..., in]; None where there is no kernel for it.

    Made for calls of a microsecond: nothing is checked but what the choice needs.

    Args:
        weight, bias: [out, in] and [out] or None; None: y comes with the base product.
        groups: as csrc takes them, every tensor of the shape that its name says.
        rows: which rows of x, seen as [tokens, in], the groups' tokens are; None: all, in order.
    """
    key: list = [x.dtype, id(weight), id(bias), rows]
    made_of: list = [groups[0].A.dtype]
    if weight is not None:
        made_of.append(weight.data_ptr())
    if bias is not None:
        made_of.append(bias.data_ptr())
    for A, B, scaling, first, count, router, top_k, qkv, num_heads, residual in groups:
        key += id(A), id(B), first, count, id(router), id(qkv)
        made_of += scaling, A.data_ptr(), A.nbytes, B.data_ptr()  # the size of A says that of B and of qkv
        if router is not None:
            made_of += router.data_ptr(), router.nbytes, top_k
        if qkv is not None:
            made_of += qkv.data_ptr(), num_heads, residual
    found = _steps.get(key := tuple(key))
    if found is None or found[0] != made_of:
        found = made_of, _make(x, weight, bias, groups, rows)
        if found[1] is not None or x.device.type == "cpu":  # on a GPU "no" may be for now: a graph is being captured
            _keep(key, found, [t for t in (weight, bias) if t is not None], groups)
    return found[1]


def _keep(key: tuple, found: tuple, base: list[Tensor], groups: Sequence[Group]) -> None:
    with _lock:
        _steps[key] = found
        for tensor in (*base, *(t for g in groups for t in g.tensors)):
            number = id(tensor)
            if number not in _keys:
                _keys[number] = weakref.ref(tensor, lambda _, number=number: _forget(number)), set()
            _keys[number][1].add(key)


def plan_step(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: Sequence[Group]) -> DecodePlan | None:
    """The plan for x and groups as :func:`find_step` takes them; None where there is no kernel for them."""
    adapters = (t for g in groups for t in g.tensors)
    base = (t for t in (weight, bias) if t is not None)
    adapter_dtype = groups[0].A.dtype
    if not all(_is_plain(t, adapter_dtype, x.device) for t in adapters):
        return None
    if not all(_is_plain(t, x.dtype, x.device) for t in base):
        return None
    return plan_groups(groups, x.numel() // x.shape[-1], x.dtype, x.device.type)


def _is_plain(t: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether an address says all of it; that of a subclass, sharded or quantised, may not."""
    return type(t) in (Tensor, nn.Parameter) and t.is_contiguous() and t.dtype == dtype and t.device == device


def plan_groups(groups: Sequence[Group], tokens: int, dtype: torch.dtype, device_type: str) -> DecodePlan | None:
    """:func:`choose_decode` for adapters whose tensors are as csrc takes them, and x [tokens, in] in `dtype`."""
    return choose_decode(
        tokens=tokens, columns=max(g.columns for g in groups), experts=max(g.experts for g in groups),
        dtype=dtype, adapter_dtype=groups[0].A.dtype, device_type=device_type,
        head=None if groups[0].qkv is None else max(g.A.shape[0] // g.num_heads for g in groups),
    )  # fmt: skip


def _fit(weight: Tensor | None, bias: Tensor | None, groups: Sequence[Group]) -> bool:
    """Whether all shapes are what they should be: a kernel would read on behind a tensor that is too small."""
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


def _make(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: Sequence[Group], rows: Sequence[int] | None
) -> AnyStep | None:
    if plan_step(x, weight, bias, groups) is None or not _fit(weight, bias, groups):
        return None
    if rows is None:
        rows = range(x.numel() // x.shape[-1])
    made = cuda.Step if x.device.type == "cuda" else native.Step
    return made(groups, rows, x.dtype, weight, bias)
