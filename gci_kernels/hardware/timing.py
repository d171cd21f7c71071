"""Times of a GPU kernel and of the library's form of its stages: by them "auto" chooses between the two.

Measured once for a variant, when it is proved, and kept in its record. A measurement is of one layer of a usual size:
it says from how many tokens the kernel pays on this GPU, not how fast a given model is.
"""

import statistics
from collections.abc import Callable
from functools import partial

import torch

from gci_kernels.hardware.kernels import Shape, get
from gci_kernels.hardware.records import Times
from gci_kernels.hardware.stages import Stage

#: For fewer tokens nothing is measured, and the library's form runs.
TOKENS = (128, 1024, 4096)
_SIZE = 2048
# rank, experts, top_k and trained rows: LoRA, LoRAMoE, LoKI. A kernel is timed by the first that has stages of it.
_LAYERS = ((16, 0, 0, 0), (32, 8, 8, 0), (0, 0, 0, 204))
_ROUNDS, _CALLS = 5, 5

Call = Callable[[], object]
#: Seconds of a call of the library's form and of one of the kernel, given in this order.
Timer = Callable[[Call, Call], tuple[float, float]]


def measure(kernel: str, dtype: torch.dtype, device: torch.device, timer: Timer | None = None) -> Times:
    """The times of each stage of `kernel` for x in `dtype`, for each of :data:`TOKENS`.

    What the kernel raises is raised. `timer`: None: :func:`by_events`.
    """
    times: Times = {}
    for tokens in TOKENS:
        for name, stage in _stages(kernel, tokens, dtype, device).items():
            library, ours = (partial(stage.implementations[impl], stage.operands, dtype) for impl in ("aten", "triton"))
            library_s, kernel_s = (timer or by_events)(library, ours)
            times.setdefault(name, []).append((tokens, float(f"{library_s:.3g}"), float(f"{kernel_s:.3g}")))
    return times


def _stages(kernel: str, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Stage]:
    layers = (Shape(tokens, _SIZE, _SIZE, *sizes) for sizes in _LAYERS)
    return next(filter(None, (get(kernel).stages(layer, dtype, device) for layer in layers)), {})


def by_events(library: Call, kernel: Call) -> tuple[float, float]:
    """By CUDA events on the current stream: medians of rounds in which the two take turns.

    Calls follow one another as in a model: where launching takes longer than the work, it is what counts.
    """
    calls = (library, kernel)
    for call in (*calls, *calls):  # the first one compiles
        call()
    spans: tuple[list, list] = [], []
    for _ in range(_ROUNDS):
        for call, made in zip(calls, spans, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(_CALLS):
                call()
            end.record()
            made.append((start, end))
    torch.cuda.current_stream().synchronize()
    found = (statistics.median(start.elapsed_time(end) for start, end in made) / 1e3 / _CALLS for made in spans)
    return next(found), next(found)
