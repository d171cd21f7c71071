"""Builds csrc/ into gci_kernels._native: plain C++17 and OpenMP, no libtorch, one binary for every x86-64 and for Arm.

A kernel source is compiled for each instruction set that brings it something, into a namespace of its own (macro
GCI_ISA); csrc/cpu/dispatch.cpp picks one when the extension is loaded. build_cuda.py adds csrc/cuda where there is an
nvcc. All of it is compiled side by side (build_ninja.py).
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))  # a build backend runs this file without its folder on the path
import build_cuda  # noqa: E402
from build_ninja import Object, compile_all  # noqa: E402

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
ISAS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = AVX512
    ISAS["avx512bf16"] = [*AVX512, "-mavx512bf16"]
    # Compilers have it from GCC 11 and clang 12 on: left out where the one at hand has not.
    ISAS["amx"] = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
# The instruction sets that a kernel is compiled for; others take it from the set below them (dispatch.cpp). Those that
# take the compiler longest first.
FLOAT = ("avx512", "avx2", "baseline")
KERNELS = {
    "decode": ("avx512bf16", *FLOAT),
    "attention": FLOAT,
    "dropout": FLOAT,
    "skinny": FLOAT,
    "gate": FLOAT,
    "skinny_bf16": ("amx", "avx512bf16"),
}
BINDINGS = [f"csrc/{name}.cpp" for name in ("decode_bindings", "bindings", "cuda_bindings", "cpu/dispatch")]
SOURCES = [*BINDINGS, *(f"csrc/cpu/{name}.cpp" for name in KERNELS)]
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.*h"))
FLAGS = ["-std=c++17", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra"]
# What GCC says of its own vector intrinsics (GCC bug 105593) is no news of ours.
KERNEL_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
KERNEL_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
BINDING_FLAGS = ["-O1"]  # they hand numbers over: more costs the compiler twice the time and brings nothing

NO_COMPILER = """
gci_kernels could not build its C++ kernels: no working C++17 compiler with OpenMP was found.
Tried: {command}
It said: {error}
Install one (Debian and Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; conda: conda install gxx) or
name one in the environment variable CXX, then run pip install again.
"""


def check_compiler(compiler: list[str]) -> None:
    """End the build with one readable message, instead of a page of compiler output, where nothing can be compiled."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\n#include <optional>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*compiler, "-std=c++17", "-fopenmp", str(source), "-o", str(Path(folder, "probe"))]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            error = done.stderr.strip() if done.returncode else None
        except OSError as failure:
            error = str(failure)
    if error is not None:
        sys.exit(NO_COMPILER.format(command=" ".join(command[:3]), error="\n".join(error.splitlines()[:5])))


def accepts(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler knows these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <immintrin.h>\n")
        command = [*compiler, *flags, "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def kernel_objects(compiler: list[str], folder: Path, isas: dict[str, list[str]]) -> list[Object]:
    return [
        Object(str(folder / isa / f"{name}.o"), f"csrc/cpu/{name}.cpp",
               (*compiler, *FLAGS, *KERNEL_FLAGS, *isas[isa], f"-DGCI_ISA={isa}", "-Icsrc"))
        for name, sets in KERNELS.items() for isa in sets if isa in isas
    ]  # fmt: skip


def binding_objects(compiler: list[str], folder: Path, isas: list[str], plan: build_cuda.Plan) -> list[Object]:
    """The bindings and the dispatcher: what knows which instruction sets there are, Python and what nvcc made."""
    others = [pybind11.get_include(), sysconfig.get_path("include")]  # -isystem: their warnings are not ours to mend
    sources = list(BINDINGS)
    if plan.toolkit is not None:
        others.append(str(plan.toolkit.include))
        sources += build_cuda.HOST_SOURCES
    options = [*(f"-DGCI_HAS_{isa.upper()}" for isa in isas), "-Icsrc", f"-I{folder / 'cuda'}"]
    options += [option for path in others for option in ("-isystem", path)]
    command = (*compiler, *FLAGS, *BINDING_FLAGS, *options)
    return [Object(str(folder / (Path(source).stem + ".o")), source, command) for source in sources]


class BuildNative(build_ext):
    def build_extension(self, ext) -> None:
        compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
        check_compiler(compiler)
        compiler += shlex.split(os.environ.get("CPPFLAGS", "")) + shlex.split(os.environ.get("CXXFLAGS", ""))
        plan, folder = build_cuda.decide(), Path(self.build_temp)
        print(f"CUDA kernels: {plan.description}", file=sys.stderr)
        isas = {isa: flags for isa, flags in ISAS.items() if isa != "amx" or accepts(compiler, flags)}
        build_cuda.write_header(plan, folder / "cuda")
        ext.extra_objects = compile_all(
            [
                *build_cuda.objects(plan, folder / "cuda"),  # nvcc takes the longest
                *binding_objects(compiler, folder, list(isas), plan),
                *kernel_objects(compiler, folder, isas),
            ],
            folder,
        )
        ext.depends += ext.extra_objects  # ninja knows best: what it made anew is linked anew
        if plan.toolkit is not None:
            ext.extra_objects.append(str(plan.toolkit.runtime))
            # torch brings a CUDA runtime of its own, perhaps another version: neither is to be taken for the other.
            ext.extra_link_args += ["-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension("gci_kernels._native", [], depends=HEADERS + SOURCES, extra_link_args=["-fopenmp"], language="c++")
    ],
    cmdclass={"build_ext": BuildNative},
)
