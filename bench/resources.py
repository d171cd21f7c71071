"""What the Triton kernels take of a chip: registers, stack, shared memory, occupancy; compiled here, without a GPU.

    python -m bench.resources

What is compiled are the launches that launches.py records.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from gci_kernels.hardware import Shape
from gci_kernels.hardware.chips import CAPABILITIES, Chip, chip_of_capability

from .launches import ROW_SHAPES, SHAPES, Launch, launches

#: Where Triton keeps NVIDIA's ptxas, cuobjdump and nvdisasm.
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """What one launch takes of a multiprocessor."""

    registers: int
    stack: int  # bytes a thread
    shared: int  # bytes a program
    spills: int  # bytes of local memory a thread; on AMD, registers
    occupancy: float  # resident warps over the most there can be


def compile_kernel(launch: Launch, capability: str) -> tuple[Resources, str]:
    """What the kernel takes of a GPU of `capability` ("sm_90"), and its assembly (PTX, or AMD's).

    Raises what Triton raises where the kernel does not compile.
    """
    compiled = compile_launch(launch, capability)
    return resources(compiled, capability), compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]


def compile_launch(launch: Launch, capability: str) -> CompiledKernel:
    """The kernel compiled for a GPU of `capability`; what Triton raises where it does not compile."""
    names, target = launch.kernel.arg_names, GPUTarget(*chip_of_capability(capability).target)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.types), dict(launch.constants), attributes)
    return triton.compile(source, target=target, options=dict(launch.options))


def resources(compiled: CompiledKernel, capability: str) -> Resources:
    """What a kernel compiled for a GPU of `capability` takes of it."""
    chip, shared, warps = chip_of_capability(capability), compiled.metadata.shared, compiled.metadata.num_warps
    if chip.target[0] == "hip":
        text = compiled.asm["amdgcn"]
        fields = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        registers, spilled_v, spilled_s, stack = (_number(rf"\.{field}:\s+(\d+)", text) for field in fields)
        spills = spilled_v + spilled_s
    else:
        registers, stack, spills = _cubin_usage(compiled.asm["cubin"])
    return Resources(registers, stack, shared, spills, _occupancy(chip, registers, shared, warps))


def _number(pattern: str, text: str) -> int:
    """The number that `pattern` finds in what a compiler reports."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"nothing in the compiler's report matches {pattern}")
    return int(found[1])


def _cubin_usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack and local memory, as NVIDIA's own tool reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (_number(rf"{field}:(\d+)", text) for field in ("REG", "STACK", "LOCAL"))
    return registers, stack, local


def _occupancy(chip: Chip, registers: int, shared: int, warps: int) -> float:
    """Resident warps of programs of `warps` warps, over the most there can be."""
    registers = -(-max(registers, 1) // 8) * 8
    if chip.target[0] == "hip":
        by_registers = 4 * min(chip.registers // registers, 8) // warps  # a program's warps are dealt to four SIMDs
        by_shared = chip.processor_shared // max(shared, 1)
    else:
        by_registers = chip.registers // (registers * 32 * warps)
        by_shared = chip.processor_shared // (shared + 1024)  # the driver reserves 1 KiB for each program
    return min(by_registers, by_shared, chip.warps // warps) * warps / chip.warps


def rows(capabilities: Iterable[str], shapes: list[Shape]) -> Iterator[tuple[str, Launch, Resources]]:
    """Each different launch of layers of `shapes` in bfloat16, adapters in float32, for each capability.

    Bottleneck adapters are compiled with and without dropout.
    """
    for capability in capabilities:
        made = [
            launch
            for shape in shapes
            for dropout_p in ((0.0,) if shape.rows else (0.0, 0.05))
            for launch in launches(shape, capability, torch.bfloat16, torch.float32, dropout_p=dropout_p)
        ]
        for launch in sorted(set(made), key=lambda launch: (launch.name, str(launch))):
            yield capability, launch, compile_kernel(launch, capability)[0]


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", nargs="+", choices=CAPABILITIES, default=CAPABILITIES, help="(default: all)")
    args = parser.parse_args(argv)
    table = Table(title="Resources of the Triton kernels: bfloat16, adapters in float32")
    for column in ("chip", "kernel", "launch", "registers", "stack", "spills", "shared KiB", "occupancy"):
        table.add_column(column, justify="left" if column in ("chip", "kernel", "launch") else "right")
    for chip, launch, used in rows(args.chip, [*SHAPES, *ROW_SHAPES]):
        table.add_row(
            chip, launch.name, str(launch), str(used.registers), str(used.stack), str(used.spills),
            f"{used.shared / 1024:.1f}", f"{used.occupancy:.0%}",
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 200).print(table)


if __name__ == "__main__":
    main()
