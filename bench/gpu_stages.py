"""The stages of one adapted layer by themselves, Triton against the library; each is checked before it is timed.

Which stages there are, and their operands, each registered kernel says itself (`stages` of hardware.Kernel). Those of
the bottleneck's products are also timed with dropout and with the adapter's weights in float32, PEFT's default.
"""

import functools
import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.hardware import KERNELS, Kernel, Shape
from gci_kernels.hardware.stages import Operands, Results, Stage
from gci_kernels.impl import implementation
from gci_kernels.ops.bottleneck import stages as bottleneck
from gci_kernels.ops.bottleneck.checks import ATEN, TRITON
from gci_kernels.ops.bottleneck.philox import Dropout
from gci_kernels.ops.bottleneck.plan import Plan
from gci_kernels.proof.verify import obstacle, widened

from .correctness import CorrectnessError
from .costs import chip_of, floor
from .gpu_plans import ORDERS, library_order
from .timing import cold_cache, interleave

Entry = dict[str, Any]
#: A name, and what measures the entry of that name.
Measurement = tuple[str, Callable[[], Entry]]
#: In what form stages are timed: as they are registered, with dropout, with the adapter's weights in float32.
FORMS = ("", "dropout", "float32 adapter")
_P, _SEED = 0.05, 2**61 + 12345
_ADAPTER = ("stack", "B")  # the operands of the bottleneck's stages that are weights of the adapter


def guarded(name: str, measure: Callable[[], Entry]) -> Entry:
    """An entry: what `measure` returns, or the error that it ended with; its memory is freed."""
    try:
        return {"name": name, **measure()}
    except Exception as error:  # the report shows it, and the other entries are still measured
        return {"name": name, "error": f"{type(error).__name__}: {error}"}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available() and not lost():
            torch.cuda.empty_cache()


def lost() -> bool:
    """Whether this process can no longer use the GPU: a kernel that reads past its memory ends all work on it."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def stage_measurements(
    method: str, shape: Shape, dtype: torch.dtype, device: torch.device, rounds: int, form: str = ""
) -> Iterator[Measurement]:
    """Each stage of each registered kernel in a layer of `shape`, whose activations are of `dtype`, in one of FORMS.

    An entry has times by implementation, errors, and the least time that the chip's rates allow.
    """
    reason = obstacle("triton", device.type, dtype)
    adapter_dtype = torch.float32 if form == "float32 adapter" else dtype
    least, prepare = _floor(shape, dtype, adapter_dtype, device), cold_cache(device)

    def measure(name: str, stage: Stage) -> Entry:
        made = {impl: run for impl, run in stage.implementations.items() if "triton" not in impl or not reason}
        stage = stage._replace(implementations=made)
        errors = _check(stage, dtype)
        fns = {impl: partial(run, stage.operands, dtype) for impl, run in made.items()}
        seconds = interleave(fns, device=device, rounds=rounds, warmup=3, prepare=prepare)
        return {
            "method": method,
            "form": form,
            "floor_seconds": least.get(name),
            "errors": errors,
            "left_out": {"triton": reason} if reason else {},
            "seconds": {impl: asdict(timing) for impl, timing in seconds.items()},
        }

    for kernel in KERNELS.values():
        for name, stage in stages_in(form, kernel, shape, dtype, device).items():
            yield f"{method} {name}{form and ', '}{form}", partial(measure, name, stage)


def stages_in(form: str, kernel: Kernel, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Stage]:
    """A kernel's stages in one of FORMS; those that do not differ in that form are left out."""
    stages = kernel.stages(shape, dtype, device)
    if form:
        stages = {name: stage for name, stage in stages.items() if _ADAPTER[0] in stage.operands and name != "dropout"}
    if form == "float32 adapter":
        stages = {name: _in_float32(stage) for name, stage in stages.items()}
    elif form == "dropout":
        stages = {name: _dropped(name, stage.operands) for name, stage in stages.items() if name in _DROPPED}
    if kernel.name != "expand" or form == "dropout":
        return stages
    return {name: _by_both_orders(stage) for name, stage in stages.items()}


def _in_float32(stage: Stage) -> Stage:
    """The same stage, of an adapter whose weights are float32."""
    return stage._replace(operands={n: t.float() if n in _ADAPTER else t for n, t in stage.operands.items()})


def _by_both_orders(stage: Stage) -> Stage:
    """With the library's two products in either order beside what the package does."""
    library = stage.implementations["aten"]

    def by(order: str, operands: Operands, dtype: torch.dtype) -> Results:
        with library_order(ORDERS[order]):
            return library(operands, dtype)

    return stage._replace(implementations=stage.implementations | {order: partial(by, order) for order in ORDERS})


# Stage -> the same with dropout of the layer's input, as the op's functions compute it by a plan.
_DROPPED: dict[str, Callable[[Plan, Operands, Dropout], Tensor]] = {
    "forward: project": lambda plan, t, drop: bottleneck.project(plan, t["x"], t["stack"].t(), drop),
    "backward: dX": lambda plan, t, drop: bottleneck.expand(
        plan, t["dprojected"], t["stack"], t["dy"], t["weight"], None, drop
    ),
    "backward: dA": lambda plan, t, drop: bottleneck.reduce(plan, t["dprojected"], t["x"], drop),
}


def _dropped(name: str, operands: Operands) -> Stage:
    """The stage with dropout for the columns of A; a router's are computed of x itself."""
    x, columns = operands["x"], operands["u"].shape[1]
    seed = torch.tensor(_SEED, device=x.device)

    @functools.cache
    def drop(plan: Plan) -> Dropout:
        """As a call has it: its mask is made once for the Triton products, which share it."""
        masks = implementation("bottleneck", "triton") if plan is TRITON else None
        return Dropout(_P, masks.dropout_bits(*x.shape, _P, seed, x.device) if masks else seed, columns)

    def by(plan: Plan, operands: Operands, dtype: torch.dtype) -> Results:
        return (_DROPPED[name](plan, operands, drop(plan)),)

    return Stage(operands, {"aten": partial(by, ATEN), "triton": partial(by, TRITON)})


def _floor(shape: Shape, dtype: torch.dtype, adapter_dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The least time of each stage by name; nothing where the device's rates are not listed."""
    chip = chip_of(device)
    if chip is None:
        return {}
    return {cost.name: cost.seconds(chip, dtype) for cost in floor(shape, dtype, adapter_dtype)}


def _check(stage: Stage, dtype: torch.dtype) -> dict[str, list[float]]:
    """The errors of every implementation's results; CorrectnessError where one's exceed twice the library's."""
    # The op rounds the adapter's weights to the dtype of activations first.
    rounded = {name: t.to(dtype) if name in _ADAPTER else t for name, t in stage.operands.items()}
    truth = stage.implementations["aten"](widened(rounded), torch.float64)
    errors = {
        impl: [relative_error(a, t) for a, t in zip(run(stage.operands, dtype), truth, strict=True)]
        for impl, run in stage.implementations.items()
    }
    for impl, made in errors.items():
        for plain, actual in zip(errors["aten"], made, strict=True):
            if not actual <= error_bound(plain, dtype):
                named = f"{impl.capitalize()} differs from float64 by {actual:.2e}"
                raise CorrectnessError(f"{named}, the library by {plain:.2e}")
    return errors
