"""Steps that are made once for some adapters and used as long as their tensors are the same ones."""

import weakref
from collections.abc import Sequence

from torch import Tensor
from torch.nn import Parameter

from gci_kernels.ops.decode import cuda, native
from gci_kernels.ops.decode.group import Group
from gci_kernels.ops.decode.plan import DecodePlan, choose_decode

AnyStep = native.Step | cuda.Step
# What a step belongs to -> the addresses that it holds, and the step; None: there is no kernel for it. The key is made
# of the tensors' ids and of settings; an entry goes when one of its tensors does, before its id can be another's.
# Nothing is put on the tensors or their modules, and nothing keeps them alive.
_steps: dict[tuple, tuple[list[int], AnyStep | None]] = {}
_keys: dict[int, tuple[weakref.ref, set[tuple]]] = {}  # by the id of a tensor


def _forget(tensor_id: int) -> None:
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
    key = (x.dtype, id(weight), id(bias), rows, *[_identity(*g) for g in groups])
    addresses, found = _addresses(weight, bias, groups), _steps.get(key)
    if found is None or found[0] != addresses:
        found = addresses, _make(x, weight, bias, groups, rows)
        if found[1] is not None or x.device.type == "cpu":  # on a GPU "no" may be for now: a graph is being captured
            _keep(key, found, [t for t in (weight, bias) if t is not None], groups)
    return found[1]


def _identity(A, B, scaling, first, count, router, top_k, qkv, num_heads, residual) -> tuple:
    return id(A), id(B), scaling, first, count, id(router), top_k, id(qkv), num_heads, residual


def _addresses(weight: Tensor | None, bias: Tensor | None, groups: Sequence[Group]) -> list[int]:
    addresses = [t.data_ptr() for t in (weight, bias) if t is not None]
    for A, B, _, _, _, router, _, qkv, _, _ in groups:
        addresses += A.data_ptr(), B.data_ptr()
        if router is not None:
            addresses.append(router.data_ptr())
        if qkv is not None:
            addresses.append(qkv.data_ptr())
    return addresses


def _keep(key: tuple, found: tuple, base: list[Tensor], groups: Sequence[Group]) -> None:
    _steps[key] = found
    for tensor in (*base, *(t for g in groups for t in g.tensors)):
        number = id(tensor)
        if number not in _keys:
            _keys[number] = weakref.ref(tensor, lambda _, number=number: _forget(number)), set()
        _keys[number][1].add(key)


def plan_step(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: Sequence[Group]) -> DecodePlan | None:
    """The plan for x and groups as :func:`find_step` takes them; None where there is no kernel for them."""
    adapter_dtype, device = groups[0].A.dtype, x.device
    adapters = [t for g in groups for t in g.tensors]
    # A subclass (DTensor) may have no memory of its own at its address.
    plain = all(type(t) in (Parameter, Tensor) for t in adapters)
    plain = plain and all(t.is_contiguous() and t.dtype == adapter_dtype and t.device == device for t in adapters)
    base = (t for t in (weight, bias) if t is not None)
    plain = plain and all(t.is_contiguous() and t.dtype == x.dtype and t.device == device for t in base)
    if not plain:
        return None
    return choose_decode(
        tokens=x.numel() // x.shape[-1], columns=max(g.columns for g in groups), experts=max(g.experts for g in groups),
        dtype=x.dtype, adapter_dtype=adapter_dtype, device_type=device.type,
        head=None if groups[0].qkv is None else max(g.A.shape[0] // g.num_heads for g in groups),
    )  # fmt: skip


def _make(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: Sequence[Group], rows: Sequence[int] | None
) -> AnyStep | None:
    if plan_step(x, weight, bias, groups) is None:
        return None
    if rows is None:
        rows = range(x.numel() // x.shape[-1])
    made = cuda.Step if x.device.type == "cuda" else native.Step
    return made(groups, rows, x.dtype, weight, bias)
