"""What the Triton kernels take of a chip: registers, stack, shared memory, occupancy; compiled here, without a GPU.

    python -m bench.resources

The launchers are called with tensors on torch's "meta" device and their launches are recorded instead of run, so what
is compiled is what would be launched: the same blocks, the same alignment, the same strides that are 1.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gci_kernels.ops import triton_config as config
from gci_kernels.ops.bottleneck import triton as stages
from gci_kernels.ops.gate import triton as gate


@dataclass(frozen=True)
class Chip:
    target: GPUTarget
    registers: int  # of 32 bits; on a multiprocessor, or for one lane of an AMD SIMD
    shared: int  # bytes on a multiprocessor, a program's fixed part taken off
    warps: int  # resident at most


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 65536, 164 * 1024, 64),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 65536, 228 * 1024, 64),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 65536, 228 * 1024, 64),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 512, 64 * 1024, 32),
}


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int  # bytes a thread
    shared: int  # bytes a program
    spills: int  # bytes of local memory a thread; on AMD, registers
    occupancy: float  # resident warps over the most there can be


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
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    def __str__(self) -> str:
        """The blocks, the strides that are 1 and the options, short."""
        parts = [f"{key.removeprefix('BLOCK_')}={value}" for key, value in self.constants if key.isupper()]
        parts += [f"{key}=1" for key, _ in self.constants if key.startswith("stride_")]
        return " ".join(parts + [f"{key.removeprefix('num_')}={value}" for key, value in self.options])


@dataclass(frozen=True)
class Case:
    """One adapted layer in training: x [tokens, features_in], `rank` columns of B, `experts` of them (0: LoRA)."""

    tokens: int
    features_in: int
    features_out: int
    rank: int
    experts: int


LLAMA_8B = [(4096, 4096), (4096, 14336), (14336, 4096)]
QWEN_05B = [(896, 896), (896, 4864), (4864, 896)]
CASES = [
    Case(tokens, *shape, rank, experts)
    for shape in LLAMA_8B + QWEN_05B
    for tokens in (8192, 512)
    for rank, experts in ((16, 0), (32, 8))
]


def launches(case: Case, capability: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> list[Launch]:
    """Everything that forward and backward of `case` launch on such a chip, without repeats."""
    made: dict[Launch, None] = {}
    with ExitStack() as undo:
        undo.enter_context(patch.object(config, "device_capability", lambda device: capability))
        for module in (stages, gate):
            for name, kernel in vars(module).copy().items():
                if name.endswith("_kernel"):
                    undo.enter_context(patch.object(module, name, _Recorder(kernel, made)))
        _train(case, dtype, adapter_dtype)
    return list(made)


def _train(case: Case, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    """The stages that ops/bottleneck/autograd.py calls, on tensors without data."""

    def tensor(rows: int, cols: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(rows, cols, dtype=dtype, device="meta")

    x, dy = tensor(case.tokens, case.features_in), tensor(case.tokens, case.features_out)
    weight, bias = tensor(case.features_out, case.features_in), torch.empty(case.features_out, device="meta")
    stack = tensor(case.rank + case.experts, case.features_in, adapter_dtype)
    B = tensor(case.features_out, case.rank, adapter_dtype)
    projected, du = stages.project(x, stack.t()), stages.project(dy, B)
    u, dprojected = tensor(case.tokens, case.rank), tensor(case.tokens, case.rank + case.experts)
    if case.experts:
        dgates = tensor(case.tokens, case.experts, torch.float32)
        for top_k in (case.experts, 2):
            gate.forward(projected, case.experts, top_k, 1.0, dtype)
            gate.backward(du, None, projected, case.experts, top_k, 1.0, dtype)
            gate.backward(du, dgates, projected, case.experts, top_k, 1.0, dtype)
    stages.expand(u, B.t(), x, weight.t(), None)
    stages.expand(u, B.t(), x, weight.t(), bias.to(dtype))
    stages.expand(dprojected, stack, dy, weight, None)
    stages.reduce(dprojected, x)
    stages.reduce(u, dy)
    stages.dropout(x, 0.05, 2**61 + 1)


class _Recorder:
    """Stands where a kernel stood; a launch becomes an entry of `made`, by the rules Triton specializes with."""

    def __init__(self, kernel: triton.JITFunction, made: dict[Launch, None]):
        self.kernel, self.made = kernel, made

    def __getitem__(self, grid) -> Callable[..., None]:
        return self.record

    def record(self, *args, **kwargs) -> None:
        names = self.kernel.arg_names
        given = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
        types, constants, aligned = {}, {}, []
        for parameter in self.kernel.params:
            name, value = parameter.name, given[parameter.name]
            if parameter.is_constexpr or type(value) is int and value == 1:
                types[name], constants[name] = "constexpr", value
                continue
            types[name] = _type(value)
            if isinstance(value, Tensor) or type(value) is int and value % 16 == 0:
                aligned.append(name)
        options = {name: value for name, value in kwargs.items() if name not in names}
        frozen = (tuple(types.items()), tuple(constants.items()), tuple(aligned), tuple(options.items()))
        self.made[Launch(self.kernel, *frozen)] = None


_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def _type(value: Tensor | int | float) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_kernel(launch: Launch, chip: str) -> tuple[Resources, str]:
    """What the kernel takes of `chip`, a key of CHIPS, and its assembly (PTX, or AMD's)."""
    names, where = launch.kernel.arg_names, CHIPS[chip]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.types), dict(launch.constants), attributes)
    made = triton.compile(source, target=where.target, options=dict(launch.options))
    shared, warps = made.metadata.shared, made.metadata.num_warps
    if where.target.backend == "hip":
        text = made.asm["amdgcn"]
        registers, spilled_v, spilled_s, stack = (
            int(re.search(rf"\.{field}:\s+(\d+)", text)[1])
            for field in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        )
        spills = spilled_v + spilled_s
    else:
        text = made.asm["ptx"]
        registers, stack, spills = _cubin_usage(made.asm["cubin"])
    return Resources(registers, stack, shared, spills, _occupancy(where, registers, shared, warps)), text


def _cubin_usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack and local memory, as NVIDIA's own tool reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{field}:(\d+)", text)[1]) for field in ("REG", "STACK", "LOCAL"))
    return registers, stack, local


def _occupancy(chip: Chip, registers: int, shared: int, warps: int) -> float:
    registers = -(-max(registers, 1) // 8) * 8
    if chip.target.backend == "hip":
        by_registers = 4 * min(chip.registers // registers, 8) // warps  # a program's warps are dealt to four SIMDs
        by_shared = chip.shared // max(shared, 1)
    else:
        by_registers = chip.registers // (registers * 32 * warps)
        by_shared = chip.shared // (shared + 1024)  # the driver keeps 1 KiB of each program's
    return min(by_registers, by_shared, chip.warps // warps) * warps / chip.warps


def rows(chips: list[str], cases: list[Case]) -> Iterator[tuple[str, Launch, Resources]]:
    """Each different launch of `cases` in bfloat16, adapters in float32, on each chip."""
    for chip in chips:
        seen = dict.fromkeys(launch for case in cases for launch in launches(case, chip, torch.bfloat16, torch.float32))
        for launch in sorted(seen, key=lambda launch: (launch.name, str(launch))):
            yield chip, launch, compile_kernel(launch, chip)[0]


def main() -> None:
    table = Table(title="Resources of the Triton kernels: bfloat16, adapters in float32")
    for column in ("chip", "kernel", "launch", "registers", "stack", "spills", "shared KiB", "occupancy"):
        table.add_column(column, justify="left" if column in ("chip", "kernel", "launch") else "right")
    for chip, launch, used in rows(list(CHIPS), CASES):
        table.add_row(
            chip, launch.name, str(launch), str(used.registers), str(used.stack), str(used.spills),
            f"{used.shared / 1024:.1f}", f"{used.occupancy:.0%}",
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 200).print(table)


if __name__ == "__main__":
    main()
