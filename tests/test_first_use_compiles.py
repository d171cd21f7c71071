"""What a kernel's first use on a GPU compiles, counted without one: few kernels, and those that training takes too."""

from collections.abc import Callable

import pytest
import torch

from gci_kernels import hardware
from gci_kernels.bench.launches import Launch, record
from gci_kernels.hardware import self_check, timing
from gci_kernels.hardware.chips import CAPABILITIES
from gci_kernels.ops.bottleneck import kernels as bottleneck
from gci_kernels.ops.gate import kernels as gate
from gci_kernels.ops.row_linear import kernels as row_linear

HALF = torch.bfloat16
# Kernel -> kernels compiled to check it without dropout and with it, and kernels compiled to time it. Some are of both;
# with dropout, one makes the mask.
COMPILED = {
    "attention": (6, 6, 0), "gate": (6, 6, 2), "project": (3, 5, 2), "expand": (3, 4, 4), "reduce": (6, 7, 6),
    "dropout": (1, 1, 1), "row_linear": (3, 3, 4),
}  # fmt: skip


def launched_by(step: Callable[[], object], capability: str) -> list[Launch]:
    """The different launches of `step`, which works on meta tensors, on a GPU of `capability`."""
    return list(dict.fromkeys(call.launch for call in record(step, capability)))


def checked(kernel: str, shape: hardware.Shape, dropout: bool = False, capability: str = "sm_90") -> list[Launch]:
    """The different launches of a check in bfloat16."""
    declared = hardware.get(kernel)
    make = declared.check_dropout or declared.check if dropout else declared.check
    return launched_by(make(shape, HALF, torch.device("meta")).kernel, capability)


def timed(kernel: str, monkeypatch) -> list[Launch]:
    """The different launches of its measurement; the operands have no data."""

    def drawing_on(device):
        return lambda rows, columns, dtype, scale=1.0: torch.empty(rows, columns, dtype=dtype, device=device)

    for module in (bottleneck, gate, row_linear):
        monkeypatch.setattr(module, "drawing_on", drawing_on)
    calls = []
    timing.measure(kernel, HALF, torch.device("meta"), lambda library, ours: calls.append(ours) or (1.0, 1.0))
    return launched_by(lambda: [call() for call in calls], "sm_90")


@pytest.mark.parametrize("kernel", hardware.names("triton"))
def test_how_many_kernels_are_compiled(kernel, monkeypatch):
    """Once each: a kernel is compiled again where a size is divisible by 16 and was not, or another tile is taken."""
    made = [len(checked(kernel, self_check.USUAL, dropout)) for dropout in (False, True)]
    assert (*made, len(timed(kernel, monkeypatch))) == COMPILED[kernel]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("shape", (self_check.USUAL, self_check.LARGE), ids=str)
def test_every_launch_is_checked(shape, capability):
    """On every chip: both products with dY from one reading too, and partial sums."""
    names = {launch.name for launch in checked("reduce", shape, capability=capability)}
    assert names == {"reduce_fwd", "project_reduce_fwd", "sum_splits"}


def test_the_largest_tiles_are_checked_and_no_whole_number_of_them():
    """In forward those that layers of thousands of tokens take; for dX smaller ones; sizes end within a tile."""
    usual = self_check.USUAL
    launches = checked("expand", usual)
    y, update, dx = (dict(launch.constants) for launch in launches)
    assert (y["BLOCK_T"], y["BLOCK_N"], dx["BLOCK_T"], dx["BLOCK_N"]) == (128, 256, 128, 128)
    assert [launch.name for launch in launches] == ["expand_persistent", "expand_fwd", "expand_persistent"]
    assert usual.tokens % 128 and usual.width % 256 and usual.depth % 128
    assert usual.depth % y["BLOCK_K"] == 0 and usual.width % dx["BLOCK_K"]  # a whole last step, and one that is not
