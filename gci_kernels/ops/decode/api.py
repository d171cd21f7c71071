"""What layers ask for a step, and, for torch.compile, the operators gci_kernels::decode and ::decode_attend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gci_kernels.ops import transforms
from gci_kernels.ops.decode import step as steps
from gci_kernels.ops.decode.group import Group
from gci_kernels.ops.decode.step import AnyStep

_library = torch.library.Library("gci_kernels", "FRAGMENT")
_BASE = "Tensor x, Tensor? weight, Tensor? bias, Tensor? y, Tensor[] A, Tensor[] B"
_TOKENS = "int[] rows, int[] counts"
_library.define(
    f"decode({_BASE}, Tensor?[] router, float[] scaling, int[] top_k, {_TOKENS}) -> Tensor",
)
_library.define(
    f"decode_attend({_BASE}, Tensor[] qkv, Tensor(a!) kv, Tensor past, Tensor? segments, float[] scaling, "
    f"int[] num_heads, bool[] residual, {_TOKENS}) -> Tensor"
)


class _TracedStep:
    """A step in a graph of torch.compile: its operator, which finds the real one when the graph runs."""

    def __init__(self, weight, bias, groups: Sequence[Group], rows: Sequence[int] | None) -> None:
        self.base, self.groups = (weight, bias), groups
        # Of one adapter for all tokens nothing is said: their number may be any.
        self.rows, self.counts = ([], []) if rows is None else (list(rows), [g.count for g in groups])

    def run(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        groups = self.groups
        return torch.ops.gci_kernels.decode(
            x, *self.base, y, [g.A for g in groups], [g.B for g in groups], [g.router for g in groups],
            [g.scaling for g in groups], [g.top_k or g.experts for g in groups], self.rows, self.counts,
        )  # fmt: skip

    def attend(self, x: Tensor, y: Tensor | None, kv: Tensor, past: Tensor, segments: Tensor | None) -> Tensor:
        groups = self.groups
        return torch.ops.gci_kernels.decode_attend(
            x, *self.base, y, [g.A for g in groups], [g.B for g in groups], [g.qkv for g in groups], kv, past, segments,
            [g.scaling for g in groups], [g.num_heads for g in groups], [g.residual for g in groups],
            self.rows, self.counts,
        )  # fmt: skip


def find_step(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: Sequence[Group], rows: tuple[int, ...] | None = None
) -> AnyStep | _TracedStep | None:
    """The kernel's step for x, which the caller then runs; None where there is none, and nothing has happened.

    Its `run(x, y)` returns the adapted layer's output [..., out] in x's dtype: with y None a new tensor, the base
    product included; else y, which holds the base product and is added to in place (in a graph of torch.compile it is
    not). `attend(x, y, kv, past, segments)` is the same for ALoRA: see native.Step and cuda.Step. No gradients flow.

    Args:
        x: [..., in], float32, bfloat16 or float16, on a CPU or a GPU; at most MAX_DECODE_TOKENS rows.
        weight, bias: the base layer's, [out, in] and [out] or None, in x's dtype; weight None: the caller has y.
        groups: the adapters and their tokens; all of them count from 0 and follow one another.
        rows: of x, seen as [tokens, in]: what the groups' tokens are, and behind them those of no group; None: all, of
            the only group.
    """
    if x.shape[-1] != groups[0].A.shape[1]:
        return None  # the library has the words for it
    if torch.compiler.is_compiling():
        # Without rows as many groups as one, whose number of tokens is the operator's to see.
        return None if steps.plan_step(x, weight, bias, groups) is None else _TracedStep(weight, bias, groups, rows)
    if transforms.under_dispatch_mode():  # which would not see a step
        return None
    return steps.find_step(x, weight, bias, groups, rows)


def _groups(x: Tensor, counts: list[int], fields: Sequence[tuple]) -> list[Group]:
    counts, groups, first = counts or [x.numel() // x.shape[-1]], [], 0
    for (A, B, router, qkv, scaling, top_k, heads, residual), count in zip(fields, counts, strict=True):
        groups.append(Group(A, B, scaling, first, count, router, top_k, qkv, heads, residual))
        first += count
    return groups


def _found(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: list[Group], rows: list[int]) -> AnyStep:
    step = steps.find_step(x, weight, bias, groups, tuple(rows) or None)
    if step is None:
        raise RuntimeError("a compiled graph has a decoding step that no kernel takes now: compile it again")
    return step


def _decode(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None, A: list[Tensor], B: list[Tensor],
    router: list[Tensor | None], scaling: list[float], top_k: list[int], rows: list[int], counts: list[int],
) -> Tensor:  # fmt: skip
    others = ([None] * len(A), scaling, top_k, [1] * len(A), [False] * len(A))
    groups = _groups(x, counts, list(zip(A, B, router, *others, strict=True)))
    return _found(x, weight, bias, groups, rows).run(x, None if y is None else y.clone())


def _decode_attend(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None, A: list[Tensor], B: list[Tensor],
    qkv: list[Tensor], kv: Tensor, past: Tensor, segments: Tensor | None, scaling: list[float], num_heads: list[int],
    residual: list[bool], rows: list[int], counts: list[int],
) -> Tensor:  # fmt: skip
    nothing = [None] * len(A)
    fields = list(zip(A, B, nothing, qkv, scaling, nothing, num_heads, residual, strict=True))
    step = _found(x, weight, bias, _groups(x, counts, fields), rows)
    return step.attend(x, None if y is None else y.clone(), kv, past, segments)


def _fake(x: Tensor, weight, bias, y, A, B, *others) -> Tensor:
    return x.new_empty(*x.shape[:-1], B[0].shape[0])


for _name, _function in (("decode", _decode), ("decode_attend", _decode_attend)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gci_kernels::{_name}", _fake, lib=_library)
