"""One Triton kernel at a time against float64, on a device: what a GPU without a record is asked before "auto" uses it.

Truth is the stage's library form (aten.py of its folder in ops/) in float64 on the same rounded
inputs, the bound that of testing.py. The kernels' outputs are poisoned first, and they run twice for the same bits.
tests/test_gpu.py asks for more shapes; under TRITON_INTERPRET=1 all of it runs on CPU tensors.
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gci_kernels.impl import Plan
from gci_kernels.ops.bottleneck import run
from gci_kernels.ops.bottleneck.philox import Dropout
from gci_kernels.testing import Check, error_bound, relative_error

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ATEN, TRITON = (Plan(*[impl] * len(dataclasses.fields(Plan))) for impl in ("aten", "triton"))
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
        one_reading=run.one_reading(TRITON, dy, rank),
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
        "projected": run.project(plan, t.x, t.stack.t()),
        "projected, dropout": run.project(plan, t.x, t.stack.t(), drop),
        "h, dropout": run.project(plan, t.x, t.stack[: t.shape.rank].t(), drop),
        "du": run.project(plan, t.dy, t.B),
    }


def _expand(t: _Inputs, plan: Plan) -> dict[str, Tensor]:
    drop = Dropout(0.5, _SEED, t.shape.rank)
    return {
        "y": run.expand(plan, t.u, t.B.t(), t.x, t.weight.t(), t.bias),
        "update": run.expand(plan, t.u, t.B.t(), t.x, None, None),
        "dx": run.expand(plan, t.dprojected, t.stack, t.dy, t.weight, None),
        "dx, dropout": run.expand(plan, t.dprojected, t.stack, t.dy, t.weight, None, drop),
    }


def _reduce(t: _Inputs, plan: Plan) -> dict[str, Tensor]:
    drop = Dropout(0.5, _SEED, t.shape.rank)
    results = {
        "dA": run.reduce(plan, t.dprojected, t.x),
        "dA, dropout": run.reduce(plan, t.dprojected, t.x, drop),
        "dB": run.reduce(plan, t.u, t.dy),
    }
    if t.one_reading:
        both = run.project_reduce(plan, t.dy, t.B, t.u) if plan is TRITON else (t.dy @ t.B.to(t.dtype), results["dB"])
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


#: stage -> every way that ops/bottleneck/autograd.py or ops/row_linear/autograd.py calls it, as named outputs.
STAGES = {
    "project": _project, "expand": _expand, "reduce": _reduce, "dropout": _dropout, "gate": _gate,
    "attention": _attention, "row_linear": _row_linear,
}  # fmt: skip


def check_kernel(
    kernel: str, device: torch.device, *, dtypes: Iterable[torch.dtype] = DTYPES, shapes: Iterable[Shape] = (ODD, LARGE)
) -> Iterator[Check]:
    """The checks of one kernel, a key of :data:`STAGES`, on `device`; what it raises is raised."""
    stage = STAGES[kernel]
    for shape in shapes:
        for dtype in dtypes:
            inputs = _make_inputs(shape, dtype, device)
            truth, plain = stage(inputs.double(), ATEN), stage(inputs, ATEN)
            with poisoned():
                actual, again = stage(inputs, TRITON), stage(inputs, TRITON)
            for name, value in actual.items():
                case = f"{kernel} {' '.join(f'{k}={v}' for k, v in vars(shape).items())}"
                check = Check(
                    case, "triton", str(dtype).removeprefix("torch."), name,
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
