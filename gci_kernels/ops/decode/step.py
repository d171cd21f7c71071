"""Steps that are made once for an adapter and used as long as its tensors are the same ones."""

import functools
import weakref

import torch
from torch import Tensor

from gci_kernels.ops.decode.native import Step
from gci_kernels.ops.decode.plan import MAX_TOKENS, choose_decode


class _Adapter:
    """What is known of the adapter that a B belongs to: its steps by dtype and number of tokens."""

    def __init__(self, A: Tensor, router: Tensor | None, B: Tensor, scaling: float, top_k: int) -> None:
        self.A, self.B = weakref.ref(A), weakref.ref(B, functools.partial(_forget, id(B)))
        self.router = None if router is None else weakref.ref(router)
        self.settings = (scaling, top_k)
        self.addresses = _addresses(A, router, B)
        self.steps: dict[tuple[torch.dtype, int], Step | None] = {}

    def is_of(self, A: Tensor, router: Tensor | None, B: Tensor, scaling: float, top_k: int) -> bool:
        return (
            self.B() is B
            and self.A() is A
            and (router is None if self.router is None else self.router() is router)
            and self.settings == (scaling, top_k)
            and self.addresses == _addresses(A, router, B)
        )


# By the id of B. Nothing is put on the tensors or their modules, and nothing keeps them alive.
_adapters: dict[int, _Adapter] = {}


def _forget(key: int, _: weakref.ref) -> None:
    _adapters.pop(key, None)


def _addresses(A: Tensor, router: Tensor | None, B: Tensor) -> tuple:
    return A.data_ptr(), B.data_ptr(), 0 if router is None else router.data_ptr(), A.dtype


def find_step(x: Tensor, A: Tensor, router: Tensor | None, B: Tensor, *, scaling: float, top_k: int = 0) -> Step | None:
    """The step of an adapter for as many tokens as x [..., in] has; None where there is no kernel for it.

    Made for calls of some microseconds: nothing is checked but what the choice needs.

    Args:
        A: [rank, in], router: [experts, in] or None, B: [out, rank]: as :func:`gci_kernels.ops.loramoe_linear` takes
            them, in one dtype.
        top_k: experts where all gates count; not used without a router.
    """
    tokens = x.numel() // A.shape[1]
    if tokens > MAX_TOKENS:
        return None
    adapter = _adapters.get(id(B))
    if adapter is None or not adapter.is_of(A, router, B, scaling, top_k):
        adapter = _adapters[id(B)] = _Adapter(A, router, B, scaling, top_k)
    key = (x.dtype, tokens)
    if key not in adapter.steps:
        adapter.steps[key] = _make(adapter, A, router, B, tokens, x)
    return adapter.steps[key]


def add_update(
    y: Tensor, x: Tensor, A: Tensor, router: Tensor | None, B: Tensor, *, scaling: float, top_k: int = 0
) -> bool:
    """y += scaling * mix(x @ A.T) @ B.T in place, if there is a kernel for such a step; whether there was.

    The caller sees to it that no gradient is wanted, that the shapes fit, and that y is its own.

    Args:
        y: [..., out], holds the base product.
        x, A, router, B, scaling, top_k: as in :func:`find_step`.
    """
    step = find_step(x, A, router, B, scaling=scaling, top_k=top_k)
    if step is None or y.dtype != x.dtype or not y.is_contiguous():
        return False
    step(y, x if x.is_contiguous() else x.contiguous())
    return True


def _make(adapter: _Adapter, A: Tensor, router: Tensor | None, B: Tensor, tokens: int, x: Tensor) -> Step | None:
    experts = 0 if router is None else router.shape[0]
    parts = [part for part in (A, router, B) if part is not None]
    chosen = choose_decode(
        tokens=tokens, columns=A.shape[0] + experts, experts=experts, dtype=x.dtype, adapter_dtype=A.dtype,
        device_type=x.device.type,
    )  # fmt: skip
    plain = all(part.is_contiguous() and part.dtype == A.dtype and part.device == x.device for part in parts)
    if chosen is None or not plain:
        return None
    return Step(A, router, B, *adapter.settings, tokens, x.dtype)
