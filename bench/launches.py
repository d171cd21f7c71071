"""What a training step launches, recorded without a GPU: the launchers run on torch's "meta" device and nothing starts.

A launch is recorded by the rules that Triton specializes a kernel by: the same blocks, the same alignment, the same
strides that are 1. resources.py compiles it, traffic.py counts its bytes.
"""

import importlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gci_kernels.hardware import Shape, get, gpus, names
from gci_kernels.ops.bottleneck import autograd, shared_input
from gci_kernels.ops.bottleneck import triton as triton_stages
from gci_kernels.ops.bottleneck.checks import TRITON
from gci_kernels.ops.bottleneck.mixer import Kept
from gci_kernels.ops.bottleneck.operands import Operands, Settings
from gci_kernels.ops.bottleneck.plan import Plan
from gci_kernels.ops.row_linear import autograd as row_autograd

# The modules that the Triton kernels are made of.
_KERNEL_MODULES = {
    f"gci_kernels.{file.removesuffix('.py').replace('/', '.')}"
    for kernel in names("triton")
    for file in get(kernel).files
}


LLAMA_8B = [(4096, 4096), (4096, 14336), (14336, 4096)]
QWEN_05B = [(896, 896), (896, 4864), (4864, 896)]
SHAPES = [
    Shape(tokens, *shape, rank, experts, experts)
    for shape in LLAMA_8B + QWEN_05B
    for tokens in (8192, 512)
    for rank, experts in ((16, 0), (32, 8))
]
# LoKI trains rows of down_proj: a tenth of them.
ROW_SHAPES = [
    Shape(tokens, *shape, 0, 0, 0, rows=shape[1] // 10)
    for shape in (LLAMA_8B[2], QWEN_05B[2])
    for tokens in (8192, 512)
]


@dataclass(frozen=True)
class Launch:
    """One way a launcher starts a kernel; equal launches compile to the same code."""

    kernel: triton.JITFunction
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[str, ...]  # arguments divisible by 16
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """The kernel's name without "_kernel": "expand_fwd"."""
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    def __str__(self) -> str:
        """The blocks, the strides that are 1 and the options, short."""
        parts = [f"{key.removeprefix('BLOCK_')}={value}" for key, value in self.constants if key.isupper()]
        parts += [f"{key}=1" for key, _ in self.constants if key.startswith("stride_")]
        return " ".join(parts + [f"{key.removeprefix('num_')}={value}" for key, value in self.options])


@dataclass(frozen=True)
class Call:
    """A launch with its grid and its arguments by name; tensors are on the meta device."""

    launch: Launch
    grid: tuple[int, ...]
    arguments: dict[str, Any]


def record(step: Callable[[], object], capability: str) -> list[Call]:
    """All that `step`, which works on meta tensors, launches on a GPU of `capability` ("sm_90"), in order."""
    made: list[Call] = []
    with ExitStack() as undo:
        undo.enter_context(patch.object(gpus, "device_capability", lambda device: capability))
        for module in map(importlib.import_module, _KERNEL_MODULES):
            for name, kernel in vars(module).copy().items():
                if isinstance(kernel, triton.JITFunction) and name.endswith("_kernel"):
                    undo.enter_context(patch.object(module, name, _Recorder(kernel, made)))
        step()
    return made


def launches(
    shape: Shape, capability: str, dtype: torch.dtype, adapter_dtype: torch.dtype, *, dropout_p: float = 0.0
) -> list[Launch]:
    """The different launches of forward and backward of a layer, with and without a bias, with gates used and not."""
    calls = []
    for bias, top_k, use_gates in ((True, 0, False), (False, 2, True)):
        if shape.rows:
            step = row_step(shape, dtype, adapter_dtype, bias=bias)
        else:
            how = dict(dropout_p=dropout_p, bias=bias, top_k=top_k, use_gates=use_gates)
            step = training_step(shape, dtype, adapter_dtype, **how)
        for direction in step:
            calls += record(direction, capability)
    return list(dict.fromkeys(call.launch for call in calls))


def training_step(
    shape: Shape, dtype: torch.dtype, adapter_dtype: torch.dtype,
    *, plan: Plan = TRITON, dropout_p: float = 0.0, bias: bool = False, top_k: int = 0, use_gates: bool = False,
) -> tuple[Callable[[], None], Callable[[], None]]:  # fmt: skip
    """Forward, and backward to x, A, B and the router, on meta tensors; to be called in this order.

    The op's functions are called without the dispatcher, which would ask meta tensors for shapes alone.
    """
    operands, settings = _layer(shape, dtype, adapter_dtype, plan, dropout_p=dropout_p, bias=bias, top_k=top_k)
    dy, experts = torch.empty(shape.tokens, shape.width, dtype=dtype, device="meta"), shape.experts
    dgates = torch.empty(shape.tokens, experts, device="meta") if use_gates and experts else None
    saved: list[Kept] = []

    def forward() -> None:
        nonlocal operands
        if dropout_p:
            operands = operands._replace(seed=_seed_or_mask(operands.x, dropout_p, plan))
        saved.append(autograd.forward(operands, settings)[1])

    def backward() -> None:
        autograd.backward(dy, dgates, operands, saved[0], settings, [True, False, False, True, True, False])

    return forward, backward


def shared_step(
    shapes: Sequence[Shape], dtype: torch.dtype, adapter_dtype: torch.dtype, *, plan: Plan = TRITON
) -> tuple[Callable[[], None], Callable[[], None]]:
    """:func:`training_step` of several layers that are given the same x, as one op."""
    layers, settings = zip(*[_layer(shape, dtype, adapter_dtype, plan) for shape in shapes], strict=True)
    layers = [t._replace(x=layers[0].x) for t in layers]
    saved: list[Kept] = []

    def forward() -> None:
        saved.extend(kept for _, kept, _ in shared_input.forward(layers, settings))

    def backward() -> None:
        parts = []
        for shape, t, kept, s in zip(shapes, layers, saved, settings, strict=True):
            dy = torch.empty(shape.tokens, shape.width, dtype=dtype, device="meta")
            needs = [False, False, True, True, t.weights is not None]
            parts.append(shared_input.Part(dy, None, t, kept, s, needs))
        shared_input.backward(parts, needs_x=True)

    return forward, backward


def _layer(
    shape: Shape, dtype: torch.dtype, adapter_dtype: torch.dtype, plan: Plan,
    *, dropout_p: float = 0.0, bias: bool = False, top_k: int = 0,
) -> tuple[Operands, Settings]:  # fmt: skip
    """A layer's operands on the meta device, and its settings."""
    tensor, experts = partial(torch.empty, dtype=dtype, device="meta"), shape.experts
    operands = Operands(
        x=tensor(shape.tokens, shape.depth),
        weight=tensor(shape.width, shape.depth),
        bias=tensor(shape.width) if bias else None,
        A=tensor(shape.rank, shape.depth, dtype=adapter_dtype),
        B=tensor(shape.width, shape.rank, dtype=adapter_dtype),
        weights=tensor(experts, shape.depth, dtype=adapter_dtype) if experts else None,
    )
    mixer, numbers = ("gate", (min(top_k or experts, experts),)) if experts else ("identity", ())
    return operands, Settings(mixer, numbers, 2.0, dropout_p, plan)


def _seed_or_mask(x: Tensor, p: float, plan: Plan) -> Tensor:
    """As gci_kernels.ops.bottleneck.mask.draw, without the dispatcher."""
    seed = torch.empty((), dtype=torch.int64, device="meta")
    return triton_stages.dropout_bits(*x.shape, p, seed, x.device) if plan == TRITON else seed


def row_step(
    shape: Shape, dtype: torch.dtype, active_dtype: torch.dtype, *, bias: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward, and backward to x and the active rows and their bias, on meta tensors."""
    tensor = partial(torch.empty, dtype=dtype, device="meta")
    x, dy = tensor(shape.tokens, shape.depth), tensor(shape.tokens, shape.width)
    weight, b = tensor(shape.width, shape.depth), tensor(shape.width) if bias else None
    active = tensor(shape.rows, shape.depth, dtype=active_dtype)
    positions = tensor(shape.rows, dtype=torch.int64)
    active_bias = tensor(shape.rows, dtype=active_dtype) if bias else None

    def forward() -> None:
        row_autograd.forward(x, weight, b, active, positions, active_bias, "triton")

    def backward() -> None:
        row_autograd._row_linear_backward(dy, x, weight, active, positions, "triton", [True, True, bias])

    return forward, backward


class _Recorder:
    """Takes the place of a kernel: a launch becomes a Call."""

    def __init__(self, kernel: triton.JITFunction, made: list[Call]) -> None:
        self.kernel, self.made = kernel, made

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.made.append(self._call(grid, args, kwargs))

    def _call(self, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        names = self.kernel.arg_names
        given = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
        types: dict[str, str] = {}
        constants: dict[str, object] = {}
        aligned = []
        for parameter in self.kernel.params:
            name, value = parameter.name, given[parameter.name]
            specialized = type(value) is int and not parameter.do_not_specialize
            if parameter.is_constexpr or specialized and value == 1:
                types[name], constants[name] = "constexpr", value
                continue
            types[name] = _type(value)
            if isinstance(value, Tensor) and not parameter.do_not_specialize or specialized and value % 16 == 0:
                aligned.append(name)
        options = {name: value for name, value in kwargs.items() if name not in names}
        frozen = (tuple(types.items()), tuple(constants.items()), tuple(aligned), tuple(options.items()))
        return Call(Launch(self.kernel, *frozen), grid, given)


_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


def _type(value: Tensor | TensorDescriptor | int | float) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_NAMES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, Tensor):
        return f"*{_NAMES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
