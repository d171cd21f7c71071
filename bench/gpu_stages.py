"""The stages of one adapted layer by themselves, Triton against the library; each is checked before it is timed.

Their operands are those of a training step: what forward and backward of ops/bottleneck/autograd.py, or for LoKI of
ops/row_linear/autograd.py, would pass.
"""

import gc
import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.ops.bottleneck import stages
from gci_kernels.ops.bottleneck.checks import ATEN, TRITON
from gci_kernels.proof.verify import obstacle

from .cases import BottleneckCase, BottleneckInputs, make_inputs
from .correctness import CorrectnessError
from .costs import BottleneckShape, Cost, RowShape, bottleneck_floor, chip_of, row_floor
from .timing import cold_cache, interleave

PLANS = {"aten": ATEN, "triton": TRITON}
# "kept" is the library's product with a copy of W that is there already; "aten" makes the copy.
FORMS = {"aten": "merge", "kept": "kept", "triton": "triton"}
Results = tuple[Tensor, ...]
Entry = dict[str, Any]


def guarded(name: str, measure: Callable[[], Entry]) -> Entry:
    """An entry: what `measure` returns, or the error that it ended with; nothing of it stays in memory."""
    try:
        return {"name": name, **measure()}
    except Exception as error:  # the rest still runs, and the report shows this one
        return {"name": name, "error": f"{type(error).__name__}: {error}"}
    finally:
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def stage_entries(case: BottleneckCase, device: torch.device, rounds: int) -> Iterator[Entry]:
    """One entry for each stage: times by implementation, errors, and the least time that the chip's rates allow."""
    tensors = _operands(make_inputs(case, device))
    stages, least = _stages(case, tensors), _floor(case, device)
    yield from _entries(case.method, stages, PLANS, tensors, least, case.dtype, device, rounds)


def row_entries(
    case: RowShape, dtype: torch.dtype, active_dtype: torch.dtype, device: torch.device, rounds: int
) -> Iterator[Entry]:
    """The same for the two products of a layer with trained rows, by each of :data:`FORMS`."""
    tensors = _row_operands(case, dtype, active_dtype, device)
    least = _seconds(row_floor(case, dtype, active_dtype), dtype, device)
    yield from _entries("loki", ROW_STAGES, FORMS, tensors, least, dtype, device, rounds)


def _entries(
    method: str, stages: dict[str, Callable], plans: dict[str, object], tensors: dict[str, Tensor],
    least: dict[str, float], dtype: torch.dtype, device: torch.device, rounds: int,
) -> Iterator[Entry]:  # fmt: skip
    """One for each of `stages`, run by each of `plans`; the one called "aten" says what is right."""
    reason = obstacle("triton", device.type, dtype)
    plans = {impl: plan for impl, plan in plans.items() if impl != "triton" or not reason}
    prepare = cold_cache(device)
    for name, stage in stages.items():

        def measure(name: str = name, stage: Callable = stage) -> Entry:
            errors = _check(stage, tensors, plans, dtype)
            fns = {impl: lambda plan=plan: stage(tensors, plan) for impl, plan in plans.items()}
            seconds = interleave(fns, device=device, rounds=rounds, warmup=3, prepare=prepare)
            return {
                "method": method,
                "floor_seconds": least.get(name),
                "errors": errors,
                "left_out": {"triton": reason} if reason else {},
                "seconds": {impl: asdict(timing) for impl, timing in seconds.items()},
            }

        yield guarded(name, measure)


def _floor(case: BottleneckCase, device: torch.device) -> dict[str, float]:
    experts = case.num_experts if case.method == "loramoe" else 0
    rank = case.rank * case.num_experts
    shape = BottleneckShape(case.tokens, case.in_features, case.out_features, rank, experts)
    return _seconds(bottleneck_floor(shape, case.dtype, case.adapter_dtype), case.dtype, device)


def _seconds(costs: list[Cost], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The least time of each stage by name; nothing where the device's rates are not listed."""
    chip = chip_of(device)
    return {} if chip is None else {cost.name: cost.seconds(chip, dtype) for cost in costs}


def _operands(inputs: BottleneckInputs) -> dict[str, Tensor]:
    """What the stages read, by its name in autograd.py; `projected` and `du` as our `project` leaves them."""
    stack = inputs.A if inputs.router is None else torch.cat((inputs.A, inputs.router))
    tokens, rank, dtype = inputs.x.shape[0], inputs.A.shape[0], inputs.x.dtype
    projected = inputs.x.float() @ stack.float().t()
    du = inputs.dy.float() @ inputs.B.float()
    return {
        "x": inputs.x,
        "dy": inputs.dy,
        "weight": inputs.weight,
        "stack": stack,
        "B": inputs.B,
        "projected": projected,
        "du": du,
        "u": (inputs.scaling * projected[:, :rank]).to(dtype),
        "dprojected": torch.cat((inputs.scaling * du, du.new_zeros(tokens, stack.shape[0] - rank)), dim=1).to(dtype),
    }


def _stages(
    case: BottleneckCase, tensors: dict[str, Tensor]
) -> dict[str, Callable[[dict[str, Tensor], object], Results]]:
    """name (roofline.py's, where it has one) -> the stage of given operands by a given plan."""
    rank, experts = case.rank * case.num_experts, case.num_experts

    def gate(plan):
        return importlib.import_module(f"gci_kernels.ops.gate.{plan.mix}")

    def dropout(plan):
        return importlib.import_module(f"gci_kernels.ops.bottleneck.{plan.dropout}")

    def both(t, plan) -> Results:
        if stages.one_reading(plan, t["dy"], rank):
            return tuple(stages.project_reduce(plan, t["dy"], t["B"], t["u"]))
        return stages.project(plan, t["dy"], t["B"]), stages.reduce(plan, t["u"], t["dy"])

    made = {
        "forward: project": lambda t, plan: (stages.project(plan, t["x"], t["stack"].t()),),
        "forward: expand": lambda t, plan: (
            stages.expand(plan, t["u"], t["B"].t(), t["x"], t["weight"].t(), None),
        ),
        "backward: dU, dB": both,
        "backward: dX": lambda t, plan: (
            stages.expand(plan, t["dprojected"], t["stack"], t["dy"], t["weight"], None),
        ),
        "backward: dA": lambda t, plan: (stages.reduce(plan, t["dprojected"], t["x"]),),
    }  # fmt: skip
    if case.method == "loramoe":
        made["forward: mix"] = lambda t, plan: gate(plan).forward(t["projected"], experts, experts, 2.0, t["x"].dtype)
        made["backward: mix"] = lambda t, plan: gate(plan).backward(
            t["du"], None, t["projected"], experts, experts, 2.0, t["x"].dtype
        )
    else:
        made["dropout"] = lambda t, plan: (dropout(plan).dropout(t["x"], 0.05, 12345),)
    return made


def _row_operands(
    case: RowShape, dtype: torch.dtype, active_dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """What ops/row_linear/autograd.py would pass, by its names; `merged` is the copy of W with the active rows."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, columns: int, std: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, generator=generator, device=device) * std).to(dtype)

    fan_in = case.in_features**-0.5
    x, dy = draw(case.tokens, case.in_features), draw(case.tokens, case.out_features)
    weight, active = draw(case.out_features, case.in_features, fan_in), draw(case.trained, case.in_features, fan_in)
    positions = torch.randperm(case.out_features, generator=generator, device=device)[: case.trained]
    merged, chosen = weight.index_copy(0, positions, active), dy.index_select(1, positions)
    return {
        "x": x, "dy": dy, "weight": weight, "active": active.to(active_dtype), "positions": positions,
        "merged": merged, "chosen": chosen,
    }  # fmt: skip


def _row_module(form: str) -> ModuleType:
    return importlib.import_module(f"gci_kernels.ops.row_linear.{'triton' if form == 'triton' else 'aten'}")


def _row_forward(t: dict[str, Tensor], form: str) -> Results:
    weight = t["merged" if form == "kept" else "weight"]
    return (_row_module(form).forward(t["x"], weight, None, t["active"], t["positions"], form),)


def _row_dx(t: dict[str, Tensor], form: str) -> Results:
    weight = t["merged" if form == "kept" else "weight"]
    return (_row_module(form).dx(t["dy"], weight, t["active"], t["positions"], t["chosen"], form),)


ROW_STAGES = {"forward": _row_forward, "backward: dX": _row_dx}


def _check(stage: Callable, tensors: dict[str, Tensor], plans: dict, dtype: torch.dtype) -> dict[str, list[float]]:
    """The errors of every implementation's results; CorrectnessError where one's pass twice the library's."""
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    truth = stage(wide, plans["aten"])
    errors = {
        impl: [relative_error(a, t) for a, t in zip(stage(tensors, plan), truth, strict=True)]
        for impl, plan in plans.items()
    }
    for impl, made in errors.items():
        for plain, actual in zip(errors["aten"], made, strict=True):
            if not actual <= error_bound(plain, dtype):
                named = f"{impl.capitalize()} differs from float64 by {actual:.2e}"
                raise CorrectnessError(f"{named}, the library by {plain:.2e}")
    return errors
