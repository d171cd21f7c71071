"""One GPU kernel at a time against float64, on a device: what a GPU without a record is asked before "auto" uses it.

Truth is the stage's library form (aten.py of its folder in ops/; for a decoding step its definition, below) in float64
on the same rounded inputs, the bound that of accuracy.py. The kernels' outputs are poisoned first, and they run twice
for the same bits. tests/test_gpu.py and, for CUDA C++, tests/test_gpu_decode.py ask for more shapes; Triton's kernels
run on CPU tensors under TRITON_INTERPRET=1.
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gci_kernels import hardware
from gci_kernels.accuracy import Check, error_bound, relative_error
from gci_kernels.ops.bottleneck import stages
from gci_kernels.ops.bottleneck.philox import Dropout
from gci_kernels.ops.bottleneck.plan import Plan
from gci_kernels.ops.decode import cuda
from gci_kernels.ops.decode.group import Group

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of a stage's two forms TRITON is the kernel; a decoding step's is in CUDA C++.
ATEN, TRITON = (Plan(*[impl] * len(Plan._fields)) for impl in ("aten", "triton"))
# The kernels return float32 sums of 16-bit operands: rounding them to float16 would err by 2e-4. What this leaves to
# matrix units is that they may cut off a sum's last bits at every step.
_UNROUNDED = 2**-15
_SEED = 2**61 + 12345


@dataclass(frozen=True)
class Shape:
    """x [tokens, depth], W [width, depth], `rank` adapter columns, `experts` router rows, `top_k` of them kept."""

    tokens: int
    depth: int
    width: int
    rank: int
    experts: int
    top_k: int


#: Nothing is a multiple of anything, and activations lie in rows of a wider tensor.
ODD = Shape(130, 67, 45, 40, 8, 2)
#: Takes the largest tiles that the kernels have, on every chip, and reads dY once for two products.
LARGE = Shape(2176, 192, 2304, 16, 4, 4)


@dataclass(frozen=True)
class _Inputs:
    """What the stages of one adapted layer read; `dtype` is that of x, and the one that outputs come in."""

    dtype: torch.dtype
    shape: Shape
    one_reading: bool  # whether the Triton stages have project_reduce for dy
    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    stack: Tensor  # [A; router], float32 like B: PEFT's default, rounded by the stages
    B: Tensor
    u: Tensor
    dprojected: Tensor
    projected: Tensor  # float32, the sums of our `project`
    du: Tensor
    rounded: Tensor  # projected as the library's `project` returns it
    rounded_du: Tensor
    dgates: Tensor

    def double(self) -> "_Inputs":
        """The same numbers, as the stages round them, in float64."""
        sums = ("projected", "du", "dgates")  # never rounded
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        wide = {name: (t if name in sums else t.to(self.dtype)).double() for name, t in tensors.items()}
        return dataclasses.replace(self, dtype=torch.float64, **wide)


def _make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> _Inputs:
    generator = torch.Generator().manual_seed(0)
    gap = 0 if shape.depth % 16 == 0 else 5

    def draw(rows: int, cols: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(rows, cols, generator=generator) * scale
        wide = torch.full((rows, cols + gap), float("nan"), dtype=dtype)  # what is read beside the rows shows
        wide[:, :cols] = values
        return wide.to(device)[:, :cols]

    tokens, depth, width, rank, experts, _ = dataclasses.astuple(shape)
    dy, hidden = draw(tokens, width), rank + experts
    projected, du = draw(tokens, hidden, dtype=torch.float32), draw(tokens, rank, dtype=torch.float32)
    return _Inputs(
        dtype=dtype,
        shape=shape,
        one_reading=stages.one_reading(TRITON, dy, rank),
        x=draw(tokens, depth),
        dy=dy,
        weight=draw(width, depth, depth**-0.5),
        bias=draw(1, width)[0],
        stack=draw(hidden, depth, depth**-0.5, torch.float32),
        B=draw(width, rank, rank**-0.5, torch.float32),
        u=draw(tokens, rank),
        dprojected=draw(tokens, hidden),
        projected=projected,
        du=du,
        rounded=projected.to(dtype),
        rounded_du=du.to(dtype),
        dgates=draw(tokens, experts, dtype=torch.float32),
    )


def _project(t: _Inputs, plan: Plan) -> dict[str, Tensor]:
    # p = 0.5 here and below: dropped values are then doubled, which rounds nothing, whoever rounds when.
    drop = Dropout(0.5, _SEED, t.shape.rank)
    return {
        "projected": stages.project(plan, t.x, t.stack.t()),
        "projected, dropout": stages.project(plan, t.x, t.stack.t(), drop),
        "h, dropout": stages.project(plan, t.x, t.stack[: t.shape.rank].t(), drop),
        "du": stages.project(plan, t.dy, t.B),
    }


def _expand(t: _Inputs, plan: Plan) -> dict[str, Tensor]:
    drop = Dropout(0.5, _SEED, t.shape.rank)
    return {
        "y": stages.expand(plan, t.u, t.B.t(), t.x, t.weight.t(), t.bias),
        "update": stages.expand(plan, t.u, t.B.t(), t.x, None, None),
        "dx": stages.expand(plan, t.dprojected, t.stack, t.dy, t.weight, None),
        "dx, dropout": stages.expand(plan, t.dprojected, t.stack, t.dy, t.weight, None, drop),
    }


def _reduce(t: _Inputs, plan: Plan) -> dict[str, Tensor]:
    drop = Dropout(0.5, _SEED, t.shape.rank)
    results = {
        "dA": stages.reduce(plan, t.dprojected, t.x),
        "dA, dropout": stages.reduce(plan, t.dprojected, t.x, drop),
        "dB": stages.reduce(plan, t.u, t.dy),
    }
    if t.one_reading:
        both = (
            stages.project_reduce(plan, t.dy, t.B, t.u) if plan is TRITON else (t.dy @ t.B.to(t.dtype), results["dB"])
        )
        results["du, one reading"], results["dB, one reading"] = both
    return results


def _dropout(t: _Inputs, plan: Plan) -> dict[str, Tensor]:
    stage = importlib.import_module(f"gci_kernels.ops.bottleneck.{plan.dropout}")
    dropped, in_place = stage.dropout(t.x, 0.3, _SEED), stage.dropout_(t.x.clone(), 0.3, _SEED)
    return {"dropped": dropped, "dropped in place": in_place, "kept": (dropped != 0).float()}


def _gate(t: _Inputs, plan: Plan) -> dict[str, Tensor]:
    gate, results = importlib.import_module(f"gci_kernels.ops.gate.{plan.mix}"), {}
    lost = t.projected.clone()
    lost[::3, -1] = float("nan")  # in the last expert's logit
    options = (t.shape.experts, t.shape.top_k, 2.0, t.dtype)
    for name, projected, du in (("", t.projected, t.du), (" of rounded", t.rounded, t.rounded_du)):
        u, gates = gate.forward(projected, *options)
        dprojected, u_again = gate.backward(du, t.dgates, projected, *options)
        alone, _ = gate.backward(du, None, projected, *options)
        made = {"u": u, "gates": gates, "dprojected": dprojected, "u in backward": u_again, "dh, no dgates": alone}
        results |= {key + name: value for key, value in made.items()}
    results["NaN gates"] = gate.forward(lost, *options)[1].isnan().float()
    return results


def _attention(t: _Inputs, plan: Plan) -> dict[str, Tensor]:
    """Four heads of four, in columns of x: one sequence, packed ones behind padding, and queries behind a past."""
    attention, results = importlib.import_module(f"gci_kernels.ops.attention.{plan.mix}"), {}
    q, k, v = (t.x[None, :, first : first + 16] for first in (0, 16, 32))
    do, tokens = t.dy[None, :, :16], t.shape.tokens
    segments = (torch.arange(tokens, dtype=torch.int32, device=q.device) // max(tokens // 3, 1))[None]
    segments[:, :5] = -1
    for name, first, ids in (("", 0, None), (", packed", 0, segments), (", past", tokens // 2, None)):
        o, lse = attention.forward(q[:, first:], k, v, 4, ids)
        dq, dk, dv = attention.backward(do[:, first:], q[:, first:], k, v, o, lse, 4, ids)
        made = {"o": o, "sums": lse.nan_to_num(neginf=0.0), "dq": dq, "dk": dk, "dv": dv}
        results |= {key + name: value for key, value in made.items()}
    return results


def _row_linear(t: _Inputs, plan: Plan) -> dict[str, Tensor]:
    """Some rows from the stack, in falling order, and all of them from W upside down."""
    form = "triton" if plan is TRITON else "merge"
    rows, results = importlib.import_module(f"gci_kernels.ops.row_linear.{'triton' if plan is TRITON else 'aten'}"), {}
    falling = torch.arange(t.shape.width - 1, -1, -1, device=t.x.device)
    some = falling[:: max(t.shape.width // t.stack.shape[0], 1)][: t.stack.shape[0]]
    for name, active, positions in ((", some", t.stack[: some.shape[0]], some), (", all", t.weight, falling)):
        chosen = t.dy.index_select(1, positions)
        made = {
            "y": rows.forward(t.x, t.weight, t.bias, active, positions, form),
            "y, no bias": rows.forward(t.x, t.weight, None, active, positions, form),
            "dx": rows.dx(t.dy, t.weight, active, positions, chosen, form),
        }
        results |= {key + name: value for key, value in made.items()}
    return results


# A decoding step: a few rows of the inputs, in no order, for adapters of different kinds; and tokens without one.


def _parts(t: _Inputs, *adapter: Tensor) -> Iterator[tuple[str, list[Tensor]]]:
    """An adapter's tensors as steps take them, in the dtype of x and in float32: the same rounded numbers."""
    for name, dtype in (("", t.dtype), (", float32 adapter", torch.float32)):
        yield name, [part.to(t.dtype).to(torch.promote_types(t.dtype, dtype)).contiguous() for part in adapter]


def _decode_step(t: _Inputs, plan: Plan) -> dict[str, Tensor]:
    """In the layer's direction and, for a longer sum, in the other; with nine tokens an adapter, four and one."""
    rank, experts, results = t.shape.rank, t.shape.experts, {}
    rows = (19, 3, 0, 7, 5, 6, 8, 1, 2, 9, 10, 18, 4, 12, 16, 14)
    layer = (t.x, t.dy, t.stack[:rank], t.stack[rank:], t.B)
    turned = (t.dy, t.x, t.B.t(), t.weight.t()[:experts], t.stack[:rank].t())
    for direction, (x, y, *adapter) in (("", layer), (", turned", turned)):
        for precision, (A, router, B) in _parts(t, *adapter):
            for most in (9, 4, 1):
                groups = [
                    Group(A, B, 2.0, 0, most, router, t.shape.top_k),
                    Group(A[:7], B[:, :7].contiguous(), -1.0, 10, min(most, 3)),
                    Group(A, B, 0.5, 14, min(most, 2), router),
                ]
                for name, start in (("y", y[:20]), ("update", torch.zeros_like(y[:20]))):
                    made = start.clone()
                    if plan is TRITON:
                        cuda.Step(groups, rows, t.dtype).add(made, x)
                    else:
                        _add_plainly(made, groups, rows, [_projected(g, x[_own(g, rows)]) for g in groups])
                    results[f"{name}{direction}{precision}, {most} tokens"] = made
    return results


def _decode_attend(t: _Inputs, plan: Plan) -> dict[str, Tensor]:
    """Four sequences, one of them padding and one without an adapter; their cache lies in wider rows."""
    rows, capacity, results = (2, 1, 0, 3), t.shape.tokens // 4, {}
    past, half = capacity - 2, t.shape.rank // 2
    segments = (torch.arange(capacity, dtype=torch.int32, device=t.x.device) // max(capacity // 3, 1)).repeat(4, 1)
    segments[3] = -1
    where = torch.tensor(past, dtype=torch.int32, device=t.x.device)
    for precision, (A, B, qkv) in _parts(t, t.stack, t.B, t.x / 4):
        groups = [
            Group(
                A[:r],
                B[:, :r].contiguous(),
                2.0,
                first,
                count,
                qkv=qkv[: 3 * r, :r].contiguous(),
                num_heads=heads,
                residual=residual,
            )
            for r, heads, first, count, residual in ((16, 4, 0, 1, False), (half, 2, 2, 2, True))
        ]
        for name, ids in (("", None), (", packed", segments)):
            kv, y = t.x[: 4 * capacity].unflatten(0, (4, capacity)).clone(), t.dy[:4].clone()
            if plan is TRITON:
                step = cuda.Step(groups, rows, t.dtype)
                step.add_attended(y, t.x, kv, where, ids)
                made = cuda.attend(step, t.x, kv, where, ids)[0]  # writes the same into the cache again
                u = [made[g.first : g.first + g.count, : g.A.shape[0]] for g in groups]
            else:
                u = [_attend_plainly(g, _own(g, rows), t.x, kv, past, ids) for g in groups]
                _add_plainly(y, groups, rows, u)
            # u is right to the cache's rounding: of the new k and v, two results may round a value differently.
            made = {"u": torch.cat([each.flatten() for each in u]).to(t.dtype), "kv": kv, "y": y}
            results |= {key + name + precision: value for key, value in made.items()}
    return results


def _own(group: Group, rows: Sequence[int]) -> list[int]:
    return list(rows[group.first : group.first + group.count])


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _projected(g: Group, x: Tensor) -> Tensor:
    h = _wide(x) @ _wide(g.A).t()
    if g.router is None:
        return h
    values, kept = (_wide(x) @ _wide(g.router).t()).topk(g.top_k or g.experts, 1)
    gates = h.new_zeros(len(x), g.experts).scatter(1, kept, values.softmax(1))
    return h * gates.repeat_interleave(h.shape[1] // g.experts, 1)


def _add_plainly(y: Tensor, groups: Sequence[Group], rows: Sequence[int], u: Sequence[Tensor]) -> None:
    for g, values in zip(groups, u, strict=True):
        own = _own(g, rows)
        y[own] = (_wide(y[own]) + g.scaling * values @ _wide(g.B).t()).to(y.dtype)


def _attend_plainly(g: Group, own: list[int], x: Tensor, kv: Tensor, past: int, segments: Tensor | None) -> Tensor:
    rank, heads = g.A.shape[0], (g.num_heads, -1)
    z = _wide(x[own]) @ _wide(g.A).t()
    q, new = (z @ _wide(g.qkv).t()).split((rank, 2 * rank), 1)
    kv[own, past, : 2 * rank] = new.to(kv.dtype)
    k, v = (part.unflatten(2, heads) for part in _wide(kv[own, : past + 1, : 2 * rank]).split(rank, 2))
    scores = torch.einsum("nhd,nkhd->nhk", q.unflatten(1, heads), k) * (rank // g.num_heads) ** -0.5
    if segments is not None:
        ids = segments[own, : past + 1]
        seen = (ids == ids[:, -1:]) & (ids[:, -1:] >= 0)
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
    weights = scores.softmax(2).nan_to_num(0.0)  # where nothing is seen
    u = torch.einsum("nhk,nkhd->nhd", weights, v).flatten(1)
    return u + z if g.residual else u


#: stage -> every way that an autograd.py of ops/ or a decoding step calls it, as named outputs.
STAGES = {
    "project": _project, "expand": _expand, "reduce": _reduce, "dropout": _dropout, "gate": _gate,
    "attention": _attention, "row_linear": _row_linear, "decode_step": _decode_step, "decode_attend": _decode_attend,
}  # fmt: skip


def check_kernel(
    kernel: str, device: torch.device, *, dtypes: Iterable[torch.dtype] = DTYPES, shapes: Iterable[Shape] = (ODD, LARGE)
) -> Iterator[Check]:
    """The checks of one kernel, a key of :data:`STAGES`, on `device`; what it raises is raised."""
    stage, impl = STAGES[kernel], "cuda" if kernel in hardware.CUDA_KERNELS else "triton"
    for shape in shapes:
        for dtype in dtypes:
            inputs = _make_inputs(shape, dtype, device)
            truth, plain = stage(inputs.double(), ATEN), stage(inputs, ATEN)
            with poisoned():
                actual, again = stage(inputs, TRITON), stage(inputs, TRITON)
            for name, value in actual.items():
                case = f"{kernel} {' '.join(f'{k}={v}' for k, v in vars(shape).items())}"
                check = Check(
                    case, impl, str(dtype).removeprefix("torch."), name,
                    relative_error(value, truth[name]),
                    _bound(relative_error(plain[name], truth[name]), dtype, value.dtype),
                )  # fmt: skip
                yield check
                same = torch.equal(value, again[name])
                yield dataclasses.replace(check, tensor=f"{name}, twice", error=0.0 if same else 1.0, bound=0.0)


def _bound(plain_error: float, dtype: torch.dtype, out_dtype: torch.dtype) -> float:
    bound = error_bound(plain_error, dtype)
    return bound if dtype == out_dtype else min(bound, _UNROUNDED)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every fresh torch.empty is full of NaN meanwhile (integers: the largest value): an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
