"""What a plan moves, in bytes, counted from the plan itself.

The op runs on torch's "meta" device, and every kernel it launches and every torch operation it calls has a cost.
Which tiles of the base product are read again is simulated with a cache of the chip's size. The adapter's own tensors
are small enough to stay in that cache, and count once.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gci_kernels.hardware import Shape
from gci_kernels.hardware.chips import Chip
from gci_kernels.ops.bottleneck.checks import ATEN, TRITON
from gci_kernels.ops.bottleneck.plan import Plan

from .costs import Cost
from .launches import Call, record, shared_step, training_step

MAX_RANK = 256  # of the adapters in a group together
PLANS = {"triton": TRITON, "aten": ATEN}


def count(
    shape: Shape, dtype: torch.dtype, adapter_dtype: torch.dtype, chip: Chip, *, plan: Plan = TRITON,
    dropout_p: float = 0.0,
) -> tuple[list[Cost], list[int]]:  # fmt: skip
    """What forward and backward under `plan` move on `chip`, in order; and the bytes of each tensor they allocate."""
    return _count(training_step(shape, dtype, adapter_dtype, plan=plan, dropout_p=dropout_p), chip)


def count_decoder_layer(
    groups: Sequence[Sequence[Shape]], dtype: torch.dtype, adapter_dtype: torch.dtype, chip: Chip,
    *, plan: Plan = TRITON, shared: bool = True,
) -> dict[str, float]:  # fmt: skip
    """The bytes that a training step of a decoder layer's adapted projections moves on `chip`.

    Args:
        groups: the projections; those of one group are given the same x.
        shared: whether the projections of a group share their passes over x; else each has its own, and autograd adds
            their dX.

    Returns:
        "activations": what the adapters read and write of x and dY beside the base products, for h, dA, dU and dB;
        "narrow": what else they move: h, u, the adapters' weights and gradients, partial sums;
        "sums": what adding up the dX of a group moves beside the base products;
        "base": the base products, forward and dX, and what they read of the adapters. A library's is counted at the
        least, each operand once; one of our own kernels with the tiles that it reads again.
    """
    found = dict.fromkeys(("activations", "narrow", "sums", "base"), 0.0)
    for group in groups:
        x = group[0].tokens * group[0].depth * dtype.itemsize
        sums = (len(group) - 1) * x
        if shared and len(group) > 1:
            steps = [shared_step(group, dtype, adapter_dtype, plan=plan)]
            found["base"] -= sums  # where a product reads dX to add onto it, _count has it as the product's
        else:
            steps = [training_step(shape, dtype, adapter_dtype, plan=plan) for shape in group]
            sums *= 3  # autograd reads two, and writes one
        found["sums"] += sums
        for cost in (cost for step in steps for cost in _count(step, chip)[0]):
            if cost.operations >= _base_operations(group):
                found["base"] += cost.moved
            else:
                found["activations"] += cost.wide
                found["narrow"] += cost.moved - cost.wide
    return found


def _base_operations(group: Sequence[Shape]) -> float:
    """The operations of the smallest base product of a group: everything with fewer is the adapters' own."""
    return min(2.0 * shape.tokens * shape.depth * shape.width for shape in group)


def llama_8b(tokens: int, rank: int, experts: int = 0) -> list[list[Shape]]:
    """The projections of a decoder layer of Llama-3.1-8B, in the groups that are given the same x."""
    hidden, kv, mlp = 4096, 1024, 14336
    sizes = [[(hidden, hidden), (hidden, kv), (hidden, kv)], [(hidden, hidden)], [(hidden, mlp)] * 2, [(mlp, hidden)]]
    return [[Shape(tokens, *size, rank, experts, experts) for size in group] for group in sizes]


def _count(directions: tuple[Callable[[], None], Callable[[], None]], chip: Chip) -> tuple[list[Cost], list[int]]:
    costs: list[Cost] = []
    allocated: list[int] = []
    for name, direction in zip(("forward", "backward"), directions, strict=True):
        operations = _Operations(name)

        def step(direction: Callable[[], None] = direction, operations: _Operations = operations) -> None:
            with operations:
                direction()

        calls = record(step, chip.capability)
        costs += [_cost(f"{name}: {call.launch.name}", call, chip) for call in calls]
        costs += operations.costs
        allocated += operations.allocated
    return costs, allocated


class _Operations(TorchDispatchMode):
    """Every torch operation that computes, with the bytes of its operands and results; and what is allocated."""

    def __init__(self, direction: str) -> None:
        super().__init__()
        self.direction = direction
        self.costs: list[Cost] = []
        self.allocated: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # The second is a view as well, although its schema does not say so.
        if func.is_view or func is torch.ops.aten._unsafe_view.default or not isinstance(result, Tensor):
            return result
        inputs = [arg for arg in pytree.tree_leaves((args, kwargs or {})) if isinstance(arg, Tensor)]
        in_place = any(result is arg for arg in inputs)
        if not in_place:
            self.allocated.append(result.nbytes)
        name = func._schema.name.removeprefix("aten::")
        if "empty" not in name:
            operations = 0
            if name in ("mm", "addmm", "addmm_"):
                left = inputs[-2]
                operations = 2 * left.shape[0] * left.shape[1] * result.shape[1]
            # What is added to in place is read as an input and written as the result.
            tensors = [*inputs, result]
            moved, wide = sum(tensor.nbytes for tensor in tensors), sum(map(_wide, tensors))
            self.costs.append(Cost(f"{self.direction}: {name}", moved, operations, wide))
        return result


def _cost(name: str, call: Call, chip: Chip) -> Cost:
    """Bytes and operations of one Triton launch; ValueError for a kernel that is not counted here."""
    kernel, given = call.launch.name, call.arguments
    tensors = {key: getattr(value, "base", value) for key, value in given.items() if key.endswith("_ptr")}
    if given.get("DROPOUT") is False:
        del tensors["bits_ptr"]  # x, which is not read there
    size = {key.removesuffix("_ptr"): tensor.nbytes for key, tensor in tensors.items()}
    moved, operations, wide = float(sum(size.values())), 0, float(sum(map(_wide, tensors.values())))
    if kernel in ("expand_fwd", "expand_persistent"):
        moved = _product_reads(call, size, chip) + size["u"] + size["m"] + size["y"]
        moved += size["bias"] if given["HAS_BIAS"] else 0
        moved += size["bits"] if given.get("DROPOUT") else 0
        operations = 2 * given["tokens"] * given["width"] * (given["depth"] + given["rank"])
    elif kernel in ("project_fwd", "reduce_fwd"):
        large, small, columns = ("x", "m", "width") if kernel == "project_fwd" else ("y", "u", "rank")
        wide *= call.grid[1]  # each tile of the narrow side's columns reads the wide operand
        moved = call.grid[1] * size[large] + size[small] + size["out"]
        operations = 2 * tensors[f"{large}_ptr"].numel() * given[columns]
        moved += size["bits"] if given["DROPOUT"] else 0
    elif kernel == "project_reduce_fwd":
        operations = 4 * given["tokens"] * given["width"] * given["rank"]
    elif kernel == "gate_bwd":
        moved -= 0 if given["HAS_DGATES"] else size["dgates"]
    elif kernel not in ("gate_fwd", "sum_splits", "dropout_fwd", "dropout_bits"):
        raise ValueError(f"{kernel} has no count of its bytes in bench/traffic.py")
    return Cost(name, moved, operations, wide)


def _wide(tensor: Tensor) -> int:
    """The bytes of a matrix without a narrow side, such as the tokens' rank values; 0 of any other tensor."""
    return tensor.nbytes if tensor.dim() == 2 and min(tensor.shape) > MAX_RANK else 0


def _product_reads(call: Call, size: dict[str, int], chip: Chip) -> float:
    """Bytes of x and w that the base product reads from memory: its tiles in launch order, with an LRU cache.

    As many programs as the chip has processors run at a time and step through the depth together. Each reads its rows
    of x and its columns of w a slice at a time, and a slice is read from memory unless it is in the cache.
    """
    given = call.arguments
    if not given.get("HAS_BASE", True):  # the persistent kernel always has one
        return 0
    tiles_t, tiles_n = -(-given["tokens"] // given["BLOCK_T"]), -(-given["width"] // given["BLOCK_N"])
    slices = 16
    slice_x, slice_w = size["x"] / tiles_t / slices, size["w"] / tiles_n / slices
    cache: OrderedDict[tuple[str, int, int], float] = OrderedDict()
    held = moved = 0.0
    for first in range(0, tiles_t * tiles_n, chip.processors):
        wave = range(first, min(first + chip.processors, tiles_t * tiles_n))
        tiles = [_tile(pid, tiles_t, tiles_n, given["GROUP"]) for pid in wave]
        for depth in range(slices):
            touched = {("x", t, depth): slice_x for t, _ in tiles} | {("w", n, depth): slice_w for _, n in tiles}
            for key, amount in touched.items():
                if key not in cache:
                    moved, held = moved + amount, held + amount
                cache[key] = amount
                cache.move_to_end(key)
            while held > chip.cache:
                held -= cache.popitem(last=False)[1]
    return moved


def _tile(pid: int, tiles_t: int, tiles_n: int, group: int) -> tuple[int, int]:
    """Row and column of a program's tile, in the order of ops/bottleneck/triton/tiles.py."""
    first = pid // (group * tiles_n) * group
    rows = min(tiles_t - first, group)
    return first + pid % (group * tiles_n) % rows, pid % (group * tiles_n) // rows
