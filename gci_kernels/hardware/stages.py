"""The stages of a layer by which GPU kernels are timed: operands, and the same results by several implementations."""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from gci_kernels.impl import implementation

Operands = dict[str, Tensor]
Results = tuple[Tensor, ...]
#: Computes a stage by the functions of a module, from operands, in the given dtype of activations.
Run = Callable[[ModuleType, Operands, torch.dtype], Results]


class Stage(NamedTuple):
    """One stage of a layer in training.

    Attributes:
        operands: on one device; to be read only.
        implementations: name -> what computes the stage from its operands, or from these in float64, in the given
            dtype of activations. "aten" is the library's, which the others are compared with; "triton" the kernel's.
    """

    operands: Operands
    implementations: dict[str, Callable[[Operands, torch.dtype], Results]]


def make_stages(op: str, operands: Operands, runs: dict[str, Run]) -> dict[str, Stage]:
    """Stages that `runs` compute by the modules aten and triton of an op, which are imported when they are called."""

    def by(impl: str, run: Run) -> Callable[[Operands, torch.dtype], Results]:
        return lambda operands, dtype: run(implementation(op, impl), operands, dtype)

    return {name: Stage(operands, {impl: by(impl, run) for impl in ("aten", "triton")}) for name, run in runs.items()}


def drawing_on(device: torch.device) -> Callable[..., Tensor]:
    """A function draw(rows, cols, dtype, scale=1.0) that makes matrices of normal numbers times `scale` on `device`.

    The generator is the device's own, which is fast on a GPU, and starts with the same seed.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, cols: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, cols, generator=generator, device=device) * scale).to(dtype)

    return draw
