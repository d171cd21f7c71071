"""Builds csrc/ into gci_kernels._native: plain C++17 and OpenMP, no libtorch, one binary for every x86-64 and for Arm.

build_cpu.py names what is compiled of csrc/cpu, build_cuda.py what nvcc compiles of csrc/cuda where there is one, and
build_ninja.py compiles all of it in parallel.
"""

import os
import platform
import shlex
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))  # a build backend runs this file without its folder on the path
import build_cpu  # noqa: E402
import build_cuda  # noqa: E402
from build_ninja import compile_all, probe  # noqa: E402

SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.*"))

NO_COMPILER = """
gci_kernels could not build its C++ kernels: no working C++17 compiler with OpenMP was found.
Tried: {command}
It said: {error}
Install one (Debian and Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; conda: conda install gxx) or
name one in the environment variable CXX, then run pip install again.
"""


def check_compiler(compiler: list[str]) -> None:
    """End the build with one readable message, instead of a page of compiler output, where nothing can be compiled."""
    command = [*compiler, "-std=c++17", "-fopenmp"]
    text = "#include <omp.h>\n#include <optional>\nint main() { return omp_get_max_threads() < 1; }\n"
    done = probe(command, "probe.cpp", text)
    if done.returncode:
        error = "\n".join(done.stderr.strip().splitlines()[:5])
        sys.exit(NO_COMPILER.format(command=" ".join(command[:3]), error=error))


class BuildNative(build_ext):
    """build_ext for sources that are compiled once for each instruction set."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles all objects and links them; ends the build with one message where that cannot be done."""
        compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
        check_compiler(compiler)
        compiler += shlex.split(os.environ.get("CPPFLAGS", "")) + shlex.split(os.environ.get("CXXFLAGS", ""))
        plan, folder = build_cuda.decide(), Path(self.build_temp)
        sets = build_cpu.instruction_sets(compiler, platform.machine())
        print(f"CPU kernels: {' '.join(each.name for each in sets)}", file=sys.stderr)
        print(f"CUDA kernels: {plan.description}", file=sys.stderr)
        build_cpu.write_header(sets, folder / "made")
        build_cuda.write_header(plan, folder / "made")
        ext.extra_objects = compile_all(
            [
                *build_cuda.objects(plan, folder / "cuda"),  # nvcc takes the longest
                *build_cpu.binding_objects(compiler, folder, *build_cuda.host(plan)),
                *build_cpu.objects(compiler, folder, sets),
            ],
            folder,
        )
        ext.depends += ext.extra_objects  # link again where ninja made one of them again
        if plan.toolkit is not None:
            ext.extra_objects.append(str(plan.toolkit.runtime))
            # torch brings a CUDA runtime of its own, perhaps another version: neither is to be taken for the other.
            ext.extra_link_args += ["-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]
        super().build_extension(ext)


setup(
    ext_modules=[Extension("gci_kernels._native", [], depends=SOURCES, extra_link_args=["-fopenmp"], language="c++")],
    cmdclass={"build_ext": BuildNative},
)
