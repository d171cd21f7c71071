"""The checks of the CUDA kernels of a decoding step, against the references of the gate and the attention in float64.

Tokens are a few rows of the inputs, in no order, with adapters of different kinds and without one.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gci_kernels.hardware import Comparison, Shape
from gci_kernels.hardware.self_check import compare, drawing
from gci_kernels.ops.attention import reference as attention
from gci_kernels.ops.decode import cuda
from gci_kernels.ops.decode.group import Group
from gci_kernels.ops.gate.reference import gate

Tensors = dict[str, Tensor]
_STEP_ROWS = (19, 3, 0, 7, 5, 6, 8, 1, 2, 9, 10, 18, 4, 12, 16, 14)
_ATTEND_ROWS = (2, 1, 0, 3)  # row 3 is padding, and token 3 has no adapter


def _make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """x [tokens, depth] and y [tokens, width] in `dtype`; the adapter in float32, but holding numbers of `dtype`."""
    draw, std = drawing(shape, device), shape.depth**-0.5

    def rounded(rows: int, cols: int, scale: float) -> Tensor:
        return draw(rows, cols, torch.float32, scale).to(dtype).float()

    return {
        "x": draw(shape.tokens, shape.depth, dtype),
        "y": draw(shape.tokens, shape.width, dtype),
        "A": rounded(shape.rank, shape.depth, std),
        "router": rounded(shape.experts, shape.depth, std),
        "B": rounded(shape.width, shape.rank, shape.rank**-0.5),
        "router of y": rounded(shape.experts, shape.width, shape.width**-0.5),
    }


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _rows_of(group: Group, rows: Sequence[int]) -> list[int]:
    return list(rows[group.first : group.first + group.count])


def _adapters(dtype: torch.dtype, *adapter: Tensor) -> Iterator[tuple[str, list[Tensor]]]:
    """An adapter's tensors as steps take them, without gaps: in the dtype of x, and in float32 or wider."""
    for name, precision in (("", dtype), (", float32 adapter", torch.promote_types(dtype, torch.float32))):
        yield name, [t.to(precision).contiguous() for t in adapter]


def _add_reference(y: Tensor, group: Group, rows: list[int], u: Tensor) -> None:
    """y[rows] += scaling * u @ B.T in place, rounded once."""
    y[rows] = torch.add(_wide(y[rows]), F.linear(u, _wide(group.B)), alpha=group.scaling).to(y.dtype)


def check_step(shape: Shape, dtype: torch.dtype, device: torch.device) -> Comparison:
    """In the layer's direction and, for a longer sum, in the other; with nine tokens an adapter, four and one."""

    def outputs(kernel: bool, t: Tensors) -> Tensors:
        results: Tensors = {}
        layer = (t["x"], t["y"], t["A"], t["router"], t["B"])
        reverse = (t["y"], t["x"], t["B"].t(), t["router of y"], t["A"].t())
        for direction, (x, y, *adapter) in (("", layer), (", reverse", reverse)):
            for precision, (A, router, B) in _adapters(x.dtype, *adapter):
                for most in (9, 4, 1):
                    groups = [
                        Group(A, B, 2.0, 0, most, router, shape.top_k),
                        Group(A[:7], B[:, :7].contiguous(), -1.0, 10, min(most, 3)),
                        Group(A, B, 0.5, 14, min(most, 2), router),
                    ]
                    for name, start in (("y", y[:20]), ("update", torch.zeros_like(y[:20]))):
                        made = start.clone()
                        if kernel:
                            cuda.Step(groups, _STEP_ROWS, x.dtype).add(made, x)
                        else:
                            for group in groups:
                                _step_reference(group, _rows_of(group, _STEP_ROWS), x, made)
                        results[f"{name}{direction}{precision}, {most} tokens"] = made
        return results

    return compare(outputs, True, False, _make_inputs(shape, dtype, device))


def _step_reference(group: Group, rows: list[int], x: Tensor, y: Tensor) -> None:
    u = F.linear(_wide(x[rows]), _wide(group.A))
    if group.router is not None:
        u, _ = gate(u, F.linear(_wide(x[rows]), _wide(group.router)), group.top_k or group.experts)
    _add_reference(y, group, rows, u)


def check_attend(shape: Shape, dtype: torch.dtype, device: torch.device) -> Comparison:
    """Four sequences, one of them padding and one without an adapter; their cache lies in wider rows."""
    capacity, half = shape.tokens // 4, shape.rank // 2
    past = capacity - 2
    segments = (torch.arange(capacity, dtype=torch.int32, device=device) // max(capacity // 3, 1)).repeat(4, 1)
    segments[3] = -1
    past_on_device = torch.tensor(past, dtype=torch.int32, device=device)

    def outputs(kernel: bool, t: Tensors) -> Tensors:
        x, results = t["x"], Tensors()
        for precision, (A, B, qkv) in _adapters(x.dtype, t["A"], t["B"], x / 4):
            groups = [
                Group(
                    A[:rank], B[:, :rank].contiguous(), 2.0, first, count,
                    qkv=qkv[: 3 * rank, :rank].contiguous(), num_heads=heads, residual=residual,
                )
                for rank, heads, first, count, residual in ((16, 4, 0, 1, False), (half, 2, 2, 2, True))
            ]  # fmt: skip
            for name, ids in (("", None), (", packed", segments)):
                kv, y = x[: 4 * capacity].unflatten(0, (4, capacity)).clone(), t["y"][:4].clone()
                if kernel:
                    step = cuda.Step(groups, _ATTEND_ROWS, x.dtype)
                    step.add_attended(y, x, kv, past_on_device, ids)
                    made = cuda.attend(step, x, kv, past_on_device, ids)[0]  # writes the same into the cache again
                    u = [made[g.first : g.first + g.count, : g.A.shape[0]] for g in groups]
                else:
                    u = [_attend_reference(g, _rows_of(g, _ATTEND_ROWS), x, kv, past, ids, y) for g in groups]
                # u is right to the cache's rounding: two results may round a value of the new k and v differently.
                values = {"u": torch.cat([each.flatten() for each in u]).to(x.dtype), "kv": kv, "y": y}
                results |= {output + name + precision: value for output, value in values.items()}
        return results

    return compare(outputs, True, False, _make_inputs(shape, dtype, device))


def _attend_reference(
    group: Group, rows: list[int], x: Tensor, kv: Tensor, past: int, segments: Tensor | None, y: Tensor
) -> Tensor:
    """Writes the new keys and values into kv, adds to y, and returns u [tokens, rank]."""
    rank = group.A.shape[0]
    z = F.linear(_wide(x[rows]), _wide(group.A))
    assert group.qkv is not None
    q, new = F.linear(z, _wide(group.qkv)).split((rank, 2 * rank), 1)
    kv[rows, past, : 2 * rank] = new.to(kv.dtype)
    k, v = _wide(kv[rows, : past + 1, : 2 * rank]).chunk(2, 2)
    ids = None if segments is None else segments[rows, : past + 1]
    u = attention.forward(q[:, None], k, v, group.num_heads, ids)[0][:, 0]
    u = u + z if group.residual else u
    _add_reference(y, group, rows, u)
    return u
