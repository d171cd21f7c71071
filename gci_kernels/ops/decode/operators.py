"""The operators gci_kernels::decode and ::decode_attend: steps in graphs of torch.compile."""

from itertools import accumulate

from torch import Tensor

from gci_kernels.ops.decode.group import Group
from gci_kernels.ops.decode.step import AnyStep, GraphStep, find_step
from gci_kernels.ops.operators import define


def _find(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: list[Group], rows: list[int]
) -> AnyStep | GraphStep:
    """The step; RuntimeError if no kernel takes it any more."""
    step = find_step(x, weight, bias, groups, tuple(rows) or None)
    if step is None:
        raise RuntimeError("a compiled graph has a decoding step that no kernel takes now: compile it again")
    return step


def _tokens(x: Tensor, counts: list[int]) -> tuple[list[int], list[int]]:
    """Each group's first token, and its number of tokens; without `counts` the only group has all of x's."""
    counts = counts or [x.numel() // x.shape[-1]]
    return list(accumulate(counts[:-1], initial=0)), counts


def _decode(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None, A: list[Tensor], B: list[Tensor],
    router: list[Tensor | None], scaling: list[float], top_k: list[int], rows: list[int], counts: list[int],
) -> Tensor:  # fmt: skip
    groups = [Group(*fields) for fields in zip(A, B, scaling, *_tokens(x, counts), router, top_k, strict=True)]
    return _find(x, weight, bias, groups, rows).run(x, None if y is None else y.clone())


def _decode_attend(  # noqa: PLR0913  # the schema's arguments
    x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None, A: list[Tensor], B: list[Tensor],
    qkv: list[Tensor], kv: Tensor, past: Tensor, segments: Tensor | None, scaling: list[float], num_heads: list[int],
    residual: list[bool], rows: list[int], counts: list[int],
) -> Tensor:  # fmt: skip
    no_gates = [None] * len(A)  # neither router nor top_k
    adapters = zip(A, B, scaling, *_tokens(x, counts), no_gates, no_gates, qkv, num_heads, residual, strict=True)
    groups = [Group(*fields) for fields in adapters]
    step = _find(x, weight, bias, groups, rows)
    return step.attend(x, None if y is None else y.clone(), kv, past, segments)


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None, A: list[Tensor], B: list[Tensor],
    *others: object,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], B[0].shape[0])


_BASE = "Tensor x, Tensor? weight, Tensor? bias, Tensor? y, Tensor[] A, Tensor[] B"
_TOKENS = "int[] rows, int[] counts"
define(f"decode({_BASE}, Tensor?[] router, float[] scaling, int[] top_k, {_TOKENS}) -> Tensor", _decode, _fake)
define(
    f"decode_attend({_BASE}, Tensor[] qkv, Tensor(a!) kv, Tensor past, Tensor? segments, float[] scaling, "
    f"int[] num_heads, bool[] residual, {_TOKENS}) -> Tensor",
    _decode_attend, _fake,
)  # fmt: skip
