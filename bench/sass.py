"""What the compilers made of the Triton kernels' main loops: the machine code of an NVIDIA GPU, read without one.

    python -m bench.sass
    python -m bench.sass --tokens 8192 --features 4096 4096 --rank 16 --json

What is compiled are the launches that launches.py records. A kernel's main loop is its innermost loop with the most
matrix work; counted is what every iteration executes. The cycles are a model, not a measurement: see `Loop.cycles`.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from gci_kernels.hardware import Shape
from gci_kernels.hardware.chips import CAPABILITIES, chip_of_capability

from .launches import Launch, launches
from .machine_code import Instruction, main_loop, parse
from .resources import TOOLS, Resources, compile_launch, resources

NVIDIA = tuple(name for name in CAPABILITIES if chip_of_capability(name).target[0] == "cuda")

# Of a Hopper multiprocessor, from NVIDIA's data sheet and its CUDA C++ Programming Guide: multiply-adds of 16-bit
# numbers, and bytes read from shared memory, in a cycle. Each of its four schedulers issues one instruction in a cycle.
_MULTIPLY_ADDS, _SHARED_BYTES, _SCHEDULERS = 2048, 128, 4
# Assumed: what a wait that leaves nothing in flight costs, which is the latency of the last product and of the next.
_DRAIN = 64


@dataclass(frozen=True)
class Loop:
    """What one iteration of a main loop executes, of one warp.

    Attributes:
        instructions: all.
        products: matrix instructions: HGMMA, or HMMA before Hopper.
        in_flight: HGMMA that are unfinished after the wait that leaves the fewest; 0: the matrix unit runs empty.
        drains: waits that leave none.
        barriers: BAR.SYNC, waits for all warps of the program.
        memory_waits: tries of an mbarrier (SYNCS), or waits for asynchronous copies (DEPBAR).
        bulk_loads: UTMALDG, whole tiles by the copy engine.
        copies: LDGSTS, at most 16 bytes a thread.
        loads: LDG, into registers.
        matrix, shared, issue: cycles of a multiprocessor that the matrix unit computes, that HGMMA read their operands
            from shared memory, and that the schedulers issue the instructions.
    """

    instructions: int
    products: int
    in_flight: int
    drains: int
    barriers: int
    memory_waits: int
    bulk_loads: int
    copies: int
    loads: int
    matrix: float
    shared: float
    issue: float

    @property
    def cycles(self) -> float:
        """A model: the busiest of the three, and 64 for each wait that leaves nothing in flight."""
        return max(self.matrix, self.shared, self.issue) + _DRAIN * self.drains


@dataclass(frozen=True)
class Code:
    """The machine code of one launch."""

    launch: Launch
    used: Resources
    stages: int
    loop: Loop | None  # None: no loop has a product
    advice: tuple[str, ...]  # the assembler's, as of products that it had to serialise


def read(launch: Launch, capability: str) -> Code:
    """Compile a launch for an NVIDIA GPU of `capability` ("sm_90") and read its machine code."""
    compiled = compile_launch(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], check=True, capture_output=True, text=True).stdout
    body, warps = main_loop(parse(text)), compiled.metadata.num_warps
    return Code(
        launch, resources(compiled, capability), compiled.metadata.num_stages,
        None if body is None else _loop(body, warps), _advice(compiled.asm["ptx"]),
    )  # fmt: skip


def _loop(body: list[Instruction], warps: int) -> Loop:
    """Counts of `body`, which `warps` warps execute."""
    names = [each.name for each in body]

    def count(*prefixes: str) -> int:
        return sum(name.startswith(prefixes) for name in names)

    in_flight, drains = _waits(body)
    groups = [each for each in body if each.name.startswith("HGMMA")]
    return Loop(
        instructions=len(body), products=count("HGMMA", "HMMA"), in_flight=in_flight, drains=drains,
        barriers=count("BAR.SYNC"), memory_waits=count("SYNCS.PHASECHK", "DEPBAR"), bulk_loads=count("UTMALDG"),
        copies=count("LDGSTS"), loads=sum(name.split(".")[0] == "LDG" for name in names),
        matrix=sum(map(multiply_adds, groups)) * warps / 4 / _MULTIPLY_ADDS,
        shared=sum(map(_shared_bytes, groups)) * warps / 4 / _SHARED_BYTES,
        issue=len(body) * warps / _SCHEDULERS,
    )  # fmt: skip


def _sizes(product: Instruction) -> tuple[int, int, int]:
    rows, columns, depth = re.findall(r"\d+", product.name.removeprefix("HGMMA."))[:3]
    return int(rows), int(columns), int(depth)


def multiply_adds(product: Instruction) -> int:
    """Of an HGMMA, which four warps execute together."""
    rows, columns, depth = _sizes(product)
    return rows * columns * depth


def _shared_bytes(product: Instruction) -> int:
    """What an HGMMA reads: of B always, of A where that is not in registers."""
    rows, columns, depth = _sizes(product)
    both = product.operands[1].startswith("gdesc")
    return 2 * depth * (columns + (rows if both else 0))


def _waits(body: list[Instruction]) -> tuple[int, int]:
    """HGMMA left in flight by the wait that leaves the fewest, and the waits that leave none, in a steady loop."""
    left: list[int] = []
    groups, current = [], 0
    for each in body * 2:  # what the first iteration leaves in flight counts in the second
        if each.name.startswith("HGMMA"):
            current += 1
            if "gsb0" in each.operands:
                groups, current = [*groups, current], 0
        elif each.name.startswith("WARPGROUP.DEPBAR"):
            allowed = int(each.operands[-1], 16)
            groups = groups[-allowed:] if allowed else []
            left.append(sum(groups))
    steady = left[len(left) // 2 :]
    return min(steady, default=0), steady.count(0)


def _advice(ptx: str) -> tuple[str, ...]:
    """The numbers and texts of the assembler's notes on lost performance."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        (target,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
        blackwell = int(re.findall(r"\d+", target)[0]) >= 100 and (TOOLS / "ptxas-blackwell").exists()
        told = subprocess.run(
            [TOOLS / ("ptxas-blackwell" if blackwell else "ptxas"), "-v", f"--gpu-name={target}", source, "-o",
             Path(folder, "kernel.cubin")], check=True, capture_output=True, text=True,
        ).stderr  # fmt: skip
    return tuple(re.findall(r"\(C\d+\) Potential Performance Loss: (.*?) in (?:the )?function", told))


def codes(shapes: list[Shape], capability: str, dropouts: tuple[float, ...] = (0.0, 0.05)) -> Iterator[Code]:
    """The launches with products of training steps of `shapes` in bfloat16, adapters in float32, each once.

    Bottleneck adapters are compiled with each of `dropouts`.
    """
    made: dict[Launch, None] = {}
    for shape in shapes:
        for dropout_p in (0.0,) if shape.rows else dropouts:
            found = launches(shape, capability, torch.bfloat16, torch.float32, dropout_p=dropout_p)
            made |= dict.fromkeys(found)
    for launch in sorted(made, key=lambda launch: (launch.name, str(launch))):
        code = read(launch, capability)
        if code.loop is not None:
            yield code


def _json(capability: str, found: list[Code]) -> str:
    entries = [
        {
            "kernel": code.launch.name, "launch": str(code.launch), **dataclasses.asdict(code.used),
            "stages": code.stages, "advice": code.advice,
            "loop": code.loop and dataclasses.asdict(code.loop) | {"cycles": code.loop.cycles},
        }
        for code in found
    ]  # fmt: skip
    return json.dumps({"capability": capability, "launches": entries}, indent=1)


_COLUMNS = (
    "kernel", "launch", "registers", "spills", "shared KiB", "stages", "products", "in flight", "drains", "barriers",
    "memory waits", "bulk loads", "copies", "instructions", "matrix", "shared", "issue", "cycles",
)  # fmt: skip


def _table(capability: str, found: list[Code]) -> Table:
    table = Table(title=f"Main loops of the Triton kernels for {capability}: bfloat16, adapters in float32")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in _COLUMNS[:2] else "right")
    for code in found:
        loop, used = code.loop, code.used
        if loop is not None:
            cells = (
                used.registers, used.spills, f"{used.shared / 1024:.1f}", code.stages, loop.products, loop.in_flight,
                loop.drains, loop.barriers, loop.memory_waits, loop.bulk_loads, loop.copies, loop.instructions,
                round(loop.matrix), round(loop.shared), round(loop.issue), round(loop.cycles),
            )  # fmt: skip
            table.add_row(code.launch.name, str(code.launch), *map(str, cells))
    return table


def main(argv: list[str] | None = None) -> None:
    """Print the table, and the assembler's advice under it; or JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.sass", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", choices=NVIDIA, default="sm_90", help="(default: sm_90)")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--features", type=int, nargs=2, default=(4096, 4096), metavar=("IN", "OUT"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--rows", type=int, default=0, help="of LoKI, in place of a bottleneck adapter")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    rank, experts = (0, 0) if args.rows else (args.rank, args.experts)
    shape = Shape(args.tokens, *args.features, rank, experts, experts, rows=args.rows)
    found = list(codes([shape], args.chip))
    if args.json:
        print(_json(args.chip, found))
        return
    console = Console(width=None if Console().is_terminal else 240)
    console.print(_table(args.chip, found))
    for code in found:
        for advice in code.advice:
            console.print(f"{code.launch.name} {code.launch}: the assembler notes: {advice}")


if __name__ == "__main__":
    main()
