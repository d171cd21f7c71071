"""Bytes and operations of a training step's stages, the least there can be, and the time that they take of a chip.

The floor of a stage reads every operand once and writes every result once. What a plan moves is counted by traffic.py.
"""

from dataclasses import dataclass

import torch

from gci_kernels.hardware import Shape
from gci_kernels.hardware.chips import Chip, chip_of_device


@dataclass(frozen=True)
class Cost:
    """One stage, kernel or operation: the bytes it moves, and its operations in matrix products.

    Attributes:
        wide: of the bytes, those of matrices with no narrow side: activations and base weights, not A, B, h or u.
    """

    name: str
    moved: float
    operations: float = 0.0
    wide: float = 0.0

    def seconds(self, chip: Chip, dtype: torch.dtype) -> float:
        """The least time on `chip`, where reading and writing overlap the products of `dtype`."""
        rate = chip.single if dtype == torch.float32 else chip.half
        return max(self.moved / chip.bandwidth, self.operations / rate)


def bottleneck_floor(shape: Shape, dtype: torch.dtype, adapter_dtype: torch.dtype) -> list[Cost]:
    """The stages of forward and backward of one adapted layer, every operand and every result once.

    x, y and the frozen weight are of `dtype`, the adapter's weights of `adapter_dtype`.
    """
    size, adapter = dtype.itemsize, adapter_dtype.itemsize
    columns = shape.rank + shape.experts
    x, y = shape.tokens * shape.depth * size, shape.tokens * shape.width * size
    weight = shape.depth * shape.width * size
    u, h, gates = shape.tokens * shape.rank * size, shape.tokens * columns * 4, shape.tokens * shape.experts * 4
    A, B = columns * shape.depth * adapter, shape.width * shape.rank * adapter
    dh, du = shape.tokens * columns * size, shape.tokens * shape.rank * 4
    dA, dB = columns * shape.depth * 4, shape.width * shape.rank * 4
    base = 2 * shape.tokens * shape.depth * shape.width
    into, out = 2 * shape.tokens * shape.depth * columns, 2 * shape.tokens * shape.width * shape.rank
    return [
        Cost("forward: project", x + A + h, into),
        Cost("forward: mix", h + u + gates),
        Cost("forward: expand", x + weight + u + B + y, base + out),
        Cost("backward: dU, dB", y + B + u + du + dB, 2 * out),
        Cost("backward: mix", du + h + dh + u),
        Cost("backward: dX", y + weight + dh + A + x, base + into),
        Cost("backward: dA", x + dh + dA, into),
    ]


def row_floor(shape: Shape, dtype: torch.dtype, adapter_dtype: torch.dtype) -> list[Cost]:
    """The same of a layer with trained rows: the frozen layer's two products, and dY's trained columns times x."""
    forward, dx = frozen_floor(shape, dtype)
    # Both products read the trained rows, in their own dtype, in place of as many rows of W.
    difference = shape.rows * shape.depth * (adapter_dtype.itemsize - dtype.itemsize)
    x, columns = shape.tokens * shape.depth * dtype.itemsize, shape.tokens * shape.rows * dtype.itemsize
    dactive = shape.rows * shape.depth * adapter_dtype.itemsize
    return [
        Cost(forward.name, forward.moved + difference, forward.operations),
        Cost(dx.name, dx.moved + difference, dx.operations),
        Cost("backward: dactive", columns + x + dactive, 2 * shape.tokens * shape.depth * shape.rows),
    ]


def frozen_floor(shape: Shape, dtype: torch.dtype) -> list[Cost]:
    """The same of the frozen layer: y and dX."""
    elements = shape.tokens * (shape.depth + shape.width) + shape.depth * shape.width
    operations = 2 * shape.tokens * shape.depth * shape.width
    return [Cost(name, elements * dtype.itemsize, operations) for name in ("forward", "backward: dX")]


def floor(shape: Shape, dtype: torch.dtype, adapter_dtype: torch.dtype) -> list[Cost]:
    """The floor of an adapted layer of either kind."""
    return (row_floor if shape.rows else bottleneck_floor)(shape, dtype, adapter_dtype)


def total_seconds(costs: list[Cost], chip: Chip, dtype: torch.dtype) -> float:
    """The least time for what runs one after another."""
    return sum(cost.seconds(chip, dtype) for cost in costs)


def chip_of(device: torch.device) -> Chip | None:
    """The chip with the rates of a CUDA device; None for other devices, and where its rates are not listed."""
    return chip_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def floor_seconds(
    shape: Shape, dtype: torch.dtype, adapter_dtype: torch.dtype, device: torch.device
) -> dict[str, float] | None:
    """The least time of forward and backward: "frozen" and "gci"; None where the device's rates are not listed."""
    chip = chip_of(device)
    if chip is None:
        return None
    costs = {"frozen": frozen_floor(shape, dtype), "gci": floor(shape, dtype, adapter_dtype)}
    return {name: total_seconds(each, chip, dtype) for name, each in costs.items()}
