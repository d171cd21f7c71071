"""What the Triton kernels take of a chip: registers, stack, shared memory, occupancy; compiled here, without a GPU.

    python -m bench.resources

launches.py records what would be launched, and that is what is compiled.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launches import CASES, DROPOUT_CASES, ROW_CASES, Launch, launches
from .roofline import Case, Rows


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


def rows(chips: list[str], cases: list[Case | Rows]) -> Iterator[tuple[str, Launch, Resources]]:
    """Each different launch of `cases` in bfloat16, adapters in float32, on each chip."""
    for chip in chips:
        seen = dict.fromkeys(launch for case in cases for launch in launches(case, chip, torch.bfloat16, torch.float32))
        for launch in sorted(seen, key=lambda launch: (launch.name, str(launch))):
            yield chip, launch, compile_kernel(launch, chip)[0]


def main() -> None:
    table = Table(title="Resources of the Triton kernels: bfloat16, adapters in float32")
    for column in ("chip", "kernel", "launch", "registers", "stack", "spills", "shared KiB", "occupancy"):
        table.add_column(column, justify="left" if column in ("chip", "kernel", "launch") else "right")
    for chip, launch, used in rows(list(CHIPS), CASES + DROPOUT_CASES + ROW_CASES):
        table.add_row(
            chip, launch.name, str(launch), str(used.registers), str(used.stack), str(used.spills),
            f"{used.shared / 1024:.1f}", f"{used.occupancy:.0%}",
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 200).print(table)


if __name__ == "__main__":
    main()
