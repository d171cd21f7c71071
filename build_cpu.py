"""What setup.py needs to compile csrc/cpu and the bindings: the instruction sets, and the kernels compiled for each.

A kernel source is compiled once for each instruction set that makes it faster, into a namespace of its own (the macro
GCI_ISA). csrc/cpu/dispatch.cpp chooses the instruction set when the extension is loaded, from those in cpu_build.h,
which is written here. docs/add_instruction_set.md describes what a new one needs.
"""

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pybind11

from build_ninja import Object, probe, write_if_changed

FLAGS = ("-std=c++17", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra")
KERNEL_FLAGS = (
    "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    "-Wno-maybe-uninitialized", "-Wno-uninitialized",  # false alarms in GCC's own vector intrinsics (GCC bug 105593)
)  # fmt: skip
BINDINGS = tuple(f"csrc/{name}.cpp" for name in ("decode_bindings", "bindings", "cuda_bindings", "cpu/dispatch"))
# They only pass numbers on: more costs the compiler twice the time and brings nothing.
BINDING_FLAGS = ("-O1",)


@dataclass(frozen=True)
class InstructionSet:
    """An instruction set of CPUs. It includes those before it in its list.

    Attributes:
        name: the value of GCI_CPU_ISA that chooses it, and the namespace of its kernels.
        flags: for the compiler, beside those of the sets before it.
        features: what the processor must have beside those of the sets before it, as __builtin_cpu_supports names it.
        sources: the kernels that are compiled for it, csrc/cpu/NAME.cpp; all others are those of the sets before it.
    """

    name: str
    flags: tuple[str, ...]
    features: tuple[str, ...]
    sources: tuple[str, ...]


#: The kernels that every processor has. Those that take the compiler longest come first.
PORTABLE = ("decode", "attention", "dropout", "skinny", "gate")
BASELINE = InstructionSet("baseline", (), (), PORTABLE)
X86_64 = (
    BASELINE,
    InstructionSet("avx2", ("-mavx2", "-mfma", "-mf16c"), ("avx2", "fma"), PORTABLE),
    InstructionSet(
        "avx512",
        ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
        ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
        PORTABLE,
    ),
    InstructionSet("avx512bf16", ("-mavx512bf16",), ("avx512bf16",), ("decode", "skinny_bf16")),
    InstructionSet("amx", ("-mamx-tile", "-mamx-bf16"), ("amx-tile", "amx-bf16"), ("skinny_bf16",)),
)


def instruction_sets(compiler: Sequence[str], machine: str) -> tuple[InstructionSet, ...]:
    """Those of a machine, named as platform.machine() does, without the last ones where the compiler is too old."""
    sets = X86_64 if machine.lower() in ("x86_64", "amd64") else (BASELINE,)
    probed = "#include <immintrin.h>\n"
    while len(sets) > 1 and probe([*compiler, *flags(sets)[-1], "-c"], "probe.cpp", probed).returncode:
        sets = sets[:-1]
    return sets


def flags(sets: Sequence[InstructionSet]) -> list[tuple[str, ...]]:
    """All flags that each of the sets needs."""
    return list(accumulate(each.flags for each in sets))


def objects(compiler: Sequence[str], folder: Path, sets: Sequence[InstructionSet]) -> list[Object]:
    """Every kernel source, compiled for every set that lists it."""
    pairs = [(source, each, needed) for each, needed in zip(sets, flags(sets), strict=True) for source in each.sources]
    order = list(dict.fromkeys(source for source, *_ in pairs))
    pairs.sort(key=lambda pair: order.index(pair[0]))
    return [
        Object(str(folder / each.name / f"{source}.o"), f"csrc/cpu/{source}.cpp",
               (*compiler, *FLAGS, *KERNEL_FLAGS, *needed, f"-DGCI_ISA={each.name}", "-Icsrc"))
        for source, each, needed in pairs
    ]  # fmt: skip


def binding_objects(
    compiler: Sequence[str], folder: Path, sources: Sequence[str] = (), includes: Sequence[Path] = ()
) -> list[Object]:
    """The bindings and the dispatcher; the headers that the build writes are in folder/made.

    Args:
        sources, includes: what else is compiled, and the folders of headers for it.
    """
    # -isystem: warnings in headers of others are not ours to fix
    others = [pybind11.get_include(), sysconfig.get_path("include"), *map(str, includes)]
    options = ["-Icsrc", f"-I{folder / 'made'}", *(option for path in others for option in ("-isystem", path))]
    command = (*compiler, *FLAGS, *BINDING_FLAGS, *options)
    return [Object(str(folder / (Path(source).stem + ".o")), source, command) for source in (*BINDINGS, *sources)]


def write_header(sets: Sequence[InstructionSet], folder: Path) -> Path:
    """cpu_build.h, which tells csrc/cpu/dispatch.cpp what is compiled; touched only where it changes."""
    lines = ["#define GCI_INSTRUCTION_SETS(SET, HAS, SOURCE)"]
    for each in sets:
        features = " && ".join(f'HAS("{feature}")' for feature in each.features) or "true"
        sources = " ".join(f"SOURCE({each.name}, {source})" for source in each.sources)
        lines.append(f"  SET({each.name}, {features}, {sources})")
    return write_if_changed(folder / "cpu_build.h", " \\\n".join(lines) + "\n")
