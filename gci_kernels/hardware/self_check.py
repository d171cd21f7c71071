"""One GPU kernel at a time against float64, on a device: what a GPU without a record is asked before "auto" uses it.

`Kernel.check` and `Kernel.check_dropout` make the inputs and name the outputs. Here the kernel runs twice, for the same
bits, its outputs poisoned before, and its error is compared with the bound of accuracy.py. tests/test_gpu.py and, for
CUDA C++, tests/test_gpu_decode.py check more shapes; Triton's kernels run on CPU tensors under TRITON_INTERPRET=1.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from gci_kernels.accuracy import Check, error_bound, relative_error
from gci_kernels.hardware.kernels import Comparison, Outputs, Shape, get

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: No size is a multiple of another, and activations lie in rows of a wider tensor.
ODD = Shape(130, 67, 45, 40, 8, 2)
#: Takes the largest tiles that the kernels have, on every chip, and reads dY once for two products.
LARGE = Shape(4352, 192, 2304, 16, 4, 4)
#: What a variant's first use is checked on: depth and width as layers have them, so that few kernels are compiled, but
#: not whole tiles. It takes the tiles of LARGE, smaller ones for dX, and reads dY once for two products.
USUAL = Shape(4350, 192, 2320, 16, 4, 4)
# The bound for float32 sums of 16-bit operands: rounding them to float16 would err by 2e-4. Matrix units may truncate
# the last bits of a sum at every step, which stays below this.
_UNROUNDED = 2**-15


def drawing(shape: Shape, device: torch.device) -> Callable[..., Tensor]:
    """A function draw(rows, cols, dtype, scale=1.0) that makes matrices of normal numbers times `scale` on `device`.

    Each check draws the same numbers in every run. Rows lie in a wider tensor with NaN beside them: reading there shows
    in the result. Where the depth is a multiple of 16, rows stay aligned.
    """
    generator = torch.Generator().manual_seed(0)
    gap = 16 if shape.depth % 16 == 0 else 5

    def draw(rows: int, cols: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        wide = torch.full((rows, cols + gap), float("nan"), dtype=dtype)
        wide[:, :cols] = torch.randn(rows, cols, generator=generator) * scale
        return wide.to(device)[:, :cols]

    return draw


def compare(
    outputs: Callable[[Any, dict[str, Tensor]], Outputs], kernel: Any, plain: Any, inputs: dict[str, Tensor],
    rounded_to: torch.dtype | None = None,
) -> Comparison:  # fmt: skip
    """Compare outputs(kernel, inputs) with outputs(plain, inputs); the truth is outputs(plain, inputs in float64).

    `rounded_to`: the dtype to which the op rounds all of its inputs first, where some of them are wider.
    """
    wide = {name: (t if rounded_to is None else t.to(rounded_to)).double() for name, t in inputs.items()}
    return Comparison(lambda: outputs(kernel, inputs), outputs(plain, inputs), outputs(plain, wide))


def check_kernel(
    name: str, device: torch.device, *, dtypes: Iterable[torch.dtype] = DTYPES, shapes: Iterable[Shape] = (ODD, LARGE),
    dropouts: Iterable[bool] = (False, True),
) -> Iterator[Check]:  # fmt: skip
    """The checks of variants of one registered kernel on `device`; what the kernel raises is raised."""
    kernel = get(name)
    # A kernel that has no variant with dropout runs the same with it.
    makers = dict.fromkeys(kernel.check_dropout or kernel.check if dropout else kernel.check for dropout in dropouts)
    for make, shape in itertools.product(makers, shapes):
        for dtype in dtypes:
            compared = make(shape, dtype, device)
            with poisoned():
                actual, repeated = compared.kernel(), compared.kernel()
            for output, value in actual.items():
                truth, plain = compared.truth[output], compared.plain[output]
                bound = error_bound(relative_error(plain, truth), dtype)
                check = Check(
                    f"{name} {' '.join(f'{k}={v}' for k, v in vars(shape).items())}",
                    kernel.language, str(dtype).removeprefix("torch."), output, relative_error(value, truth),
                    bound if value.dtype == dtype else min(bound, _UNROUNDED),
                )  # fmt: skip
                yield check
                same = torch.equal(value, repeated[output])
                yield dataclasses.replace(check, tensor=f"{output}, twice", error=0.0 if same else 1.0, bound=0.0)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every fresh torch.empty is full of NaN meanwhile (integers: the largest value): an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # whose properties are not typed
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill
