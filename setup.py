"""Builds csrc/ into gci_kernels._native: plain C++17 and OpenMP, no libtorch, one binary for every x86-64 and for Arm.

Each kernel source is compiled once per instruction set, into a namespace of its own (macro GCI_ISA);
csrc/cpu/dispatch.cpp picks one when the extension is loaded. build_cuda.py adds csrc/cuda where there is an nvcc.
"""

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))  # a build backend runs this file without its folder on the path
import build_cuda  # noqa: E402

KERNELS = ("gate", "attention", "decode", "dropout", "skinny", "skinny_bf16", "table")
KERNEL_SOURCES = [f"csrc/cpu/{name}.cpp" for name in KERNELS]
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.*h"))
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall"]

ISAS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
    ISAS["avx512bf16"] = [*ISAS["avx512"], "-mavx512bf16"]
# Compilers have it from GCC 11 and clang 12 on: added to the others where the one at hand does.
AMX = [*ISAS["avx512bf16"], "-mamx-tile", "-mamx-bf16"] if "avx512bf16" in ISAS else None

NO_COMPILER = """
gci_kernels could not build its C++ kernels: no working C++17 compiler with OpenMP was found.
Tried: {command}
It said: {error}
Install one (Debian and Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; conda: conda install gxx) or
name one in the environment variable CXX, then run pip install again.
"""


def check_compiler(compiler) -> None:
    """End the build with one readable message, instead of a page of distutils output, where nothing can be compiled."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\n#include <optional>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*compiler.compiler_cxx, "-std=c++17", "-fopenmp", str(source), "-o", str(Path(folder, "probe"))]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            error = done.stderr.strip() if done.returncode else None
        except OSError as failure:
            error = str(failure)
    if error is not None:
        sys.exit(NO_COMPILER.format(command=" ".join(command[:3]), error="\n".join(error.splitlines()[:5])))


def accepts(compiler, flags: list[str]) -> bool:
    """Whether the compiler knows these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <immintrin.h>\n")
        command = [*compiler.compiler_cxx, *flags, "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


class BuildNative(build_ext):
    def build_extension(self, ext) -> None:
        if "CXX" in os.environ:
            self.compiler.compiler_cxx = os.environ["CXX"].split()
        check_compiler(self.compiler)
        plan = build_cuda.decide()
        print(f"CUDA kernels: {plan.description}", file=sys.stderr)
        isas = ISAS | ({"amx": AMX} if AMX and accepts(self.compiler, AMX) else {})
        ext.define_macros += [("GCI_HAS_" + isa.upper(), "1") for isa in isas]
        for isa, flags in isas.items():
            ext.extra_objects += self.compiler.compile(
                KERNEL_SOURCES,
                output_dir=os.path.join(self.build_temp, isa),
                macros=[("GCI_ISA", isa)],
                include_dirs=["csrc"],
                extra_postargs=FLAGS + flags,
                depends=HEADERS,
            )
        self.add_cuda(ext, plan)
        super().build_extension(ext)

    def add_cuda(self, ext, plan: build_cuda.Plan) -> None:
        folder = Path(self.build_temp, "cuda")
        ext.depends.append(str(build_cuda.write_header(plan, folder)))
        ext.include_dirs.append(str(folder))
        if plan.toolkit is None:
            return
        ext.sources += build_cuda.HOST_SOURCES
        ext.include_dirs.append(str(plan.toolkit.include))
        ext.extra_objects += [*build_cuda.compile_sources(plan, folder), str(plan.toolkit.runtime)]
        # torch brings a CUDA runtime of its own, perhaps another version: neither is to be taken for the other.
        ext.extra_link_args += ["-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]


setup(
    ext_modules=[
        Pybind11Extension(
            "gci_kernels._native",
            ["csrc/bindings.cpp", "csrc/decode_bindings.cpp", "csrc/cuda_bindings.cpp", "csrc/cpu/dispatch.cpp"],
            include_dirs=["csrc"],
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
            depends=HEADERS + KERNEL_SOURCES,
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
