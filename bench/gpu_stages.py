"""The stages of one adapted layer by themselves, Triton against the library; each is checked before it is timed.

Their operands are those of a training step: what forward and backward of ops/bottleneck/autograd.py would pass.
"""

import gc
import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from gci_kernels.ops.bottleneck import run
from gci_kernels.self_check import ATEN, TRITON
from gci_kernels.testing import error_bound, relative_error
from gci_kernels.verify import obstacle

from . import roofline
from .cases import BottleneckCase, BottleneckInputs, make_inputs
from .correctness import CorrectnessError
from .timing import cold_cache, interleave

PLANS = {"aten": ATEN, "triton": TRITON}
Results = tuple[Tensor, ...]


def guarded(name: str, measure: Callable[[], dict]) -> dict:
    """An entry: what `measure` returns, or the error that it ended with; nothing of it stays in memory."""
    try:
        return {"name": name, **measure()}
    except Exception as error:  # the rest still runs, and the report shows this one
        return {"name": name, "error": f"{type(error).__name__}: {error}"}
    finally:
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def stage_entries(case: BottleneckCase, device: torch.device, rounds: int) -> Iterator[dict]:
    """One entry for each stage: times by implementation, errors, and the least time that the chip's rates allow."""
    reason = obstacle("triton", device.type, case.dtype)
    plans = {"aten": ATEN} if reason else PLANS
    least, prepare = _floor(case, device), cold_cache(device)
    tensors = _operands(make_inputs(case, device))
    for name, stage in _stages(case, tensors).items():

        def measure(name: str = name, stage: Callable = stage) -> dict:
            errors = _check(stage, tensors, plans, case.dtype)
            fns = {impl: lambda plan=plan: stage(tensors, plan) for impl, plan in plans.items()}
            seconds = interleave(fns, device=device, rounds=rounds, warmup=3, prepare=prepare)
            return {
                "method": case.method,
                "floor_seconds": least.get(name),
                "errors": errors,
                "left_out": {"triton": reason} if reason else {},
                "seconds": {impl: asdict(timing) for impl, timing in seconds.items()},
            }

        yield guarded(name, measure)


def _floor(case: BottleneckCase, device: torch.device) -> dict[str, float]:
    chip = roofline.chip_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if chip is None:
        return {}
    experts = case.num_experts if case.method == "loramoe" else 0
    rank = case.rank * case.num_experts
    shape = roofline.Case(case.tokens, case.in_features, case.out_features, rank, experts)
    entries = roofline.floor(shape, case.dtype, case.adapter_dtype)
    return {entry.name: chip.seconds(entry.moved, entry.operations, case.dtype) for entry in entries}


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
        if run.one_reading(plan, t["dy"], rank):
            return tuple(run.project_reduce(plan, t["dy"], t["B"], t["u"]))
        return run.project(plan, t["dy"], t["B"]), run.reduce(plan, t["u"], t["dy"])

    made = {
        "forward: project": lambda t, plan: (run.project(plan, t["x"], t["stack"].t()),),
        "forward: expand": lambda t, plan: (
            run.expand(plan, t["u"], t["B"].t(), t["x"], t["weight"].t(), None),
        ),
        "backward: dU, dB": both,
        "backward: dX": lambda t, plan: (
            run.expand(plan, t["dprojected"], t["stack"], t["dy"], t["weight"], None),
        ),
        "backward: dA": lambda t, plan: (run.reduce(plan, t["dprojected"], t["x"]),),
    }  # fmt: skip
    if case.method == "loramoe":
        made["forward: mix"] = lambda t, plan: gate(plan).forward(t["projected"], experts, experts, 2.0, t["x"].dtype)
        made["backward: mix"] = lambda t, plan: gate(plan).backward(
            t["du"], None, t["projected"], experts, experts, 2.0, t["x"].dtype
        )
    else:
        made["dropout"] = lambda t, plan: (dropout(plan).dropout(t["x"], 0.05, 12345),)
    return made


def _check(stage: Callable, tensors: dict[str, Tensor], plans: dict, dtype: torch.dtype) -> dict[str, list[float]]:
    """The errors of every implementation's results; CorrectnessError where Triton's pass twice the library's."""
    truth = stage({name: tensor.double() for name, tensor in tensors.items()}, ATEN)
    errors = {
        impl: [relative_error(a, t) for a, t in zip(stage(tensors, plan), truth, strict=True)]
        for impl, plan in plans.items()
    }
    for plain, actual in zip(errors["aten"], errors.get("triton", errors["aten"]), strict=True):
        if not actual <= error_bound(plain, dtype):
            raise CorrectnessError(f"Triton differs from float64 by {actual:.2e}, the library by {plain:.2e}")
    return errors
