"""docs/add_instruction_set.md and docs/add_kernel.md, followed: their changes are made in a copy, compiled and run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DIFF = re.compile(r"^```diff\n(.*?)^```$", flags=re.M | re.S)


def changed_copy(page: str, folder: Path, *names: str) -> Path:
    """A copy of files and folders of the project, with the changes of a page of docs."""
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    changes = DIFF.findall((ROOT / "docs" / page).read_text())
    assert changes
    for change in changes:
        command = ["git", "apply", "--whitespace=nowarn", "-"]
        done = subprocess.run(command, input=change, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"the page does not fit the sources: {done.stderr}\n{change}"
    return folder


def run(folder: Path, *arguments: str, **variables: str) -> str:
    """The output of Python, with the copy's modules."""
    variables = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "2"} | variables
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


# The whole list of instruction sets, each with kernels of one source at most, so that little has to be compiled.
BUILD = """
import dataclasses, os, shlex, subprocess, sys
from pathlib import Path

import build_cpu
from build_ninja import compile_all

compiler, folder = [*shlex.split(os.environ.get("CXX", "g++")), "-Werror"], Path("built")
sets = build_cpu.instruction_sets(compiler, "x86_64")
def compile_only(source, objects=(), sets=sets):
    sets = [dataclasses.replace(s, sources=tuple({source} & set(s.sources)), ) for s in sets]
    build_cpu.write_header(sets, folder / "made")
    made = [*objects, *build_cpu.objects(compiler, folder, sets)]
    made = [dataclasses.replace(each, command=(*each.command, "-O0", "-Wno-unused-parameter")) for each in made]
    return [*compiler, "-fopenmp", *compile_all(made, folder)]
"""

NEW_SET = """
if sets[-1].name != "avx512fp16":
    sys.exit(print("unknown to the compiler"))
assert sets[-1].sources == ("decode",)
main = Path("main.cpp")
main.write_text('''
#include <cstdio>
#include "cpu/dispatch.h"
int main() {
  for (const std::string& name : gci::instruction_sets()) std::printf("%s ", name.c_str());
  std::printf("uses %s %d\\\\n", gci::kernels().isa, gci::kernels().decode != nullptr);
}
''')
ends = (sets[0], sets[-1])
sets = [s if s in ends else dataclasses.replace(s, sources=()) for s in sets]
command = (*compiler, *build_cpu.FLAGS, "-Icsrc", f"-I{folder / 'made'}")
sources = [str(main), "csrc/cpu/dispatch.cpp"]
objects = [build_cpu.Object(str(folder / (Path(source).stem + ".o")), source, command) for source in sources]
link = compile_only("decode", objects, sets)
subprocess.run([*link, "-o", "main"], check=True)
"""


def test_add_an_instruction_set(tmp_path):
    """Its kernels are compiled with all flags it needs, listed, and chosen where the processor has it."""
    folder = changed_copy("add_instruction_set.md", tmp_path, "csrc", "build_cpu.py", "build_ninja.py")
    if "unknown" in run(folder, "-c", BUILD + NEW_SET):
        pytest.skip("the compiler does not know AVX512_FP16")
    flags = (folder / "built" / "build.ninja").read_text()
    assert re.search(r"-mavx2 .*-mavx512f .*-mavx512bf16 .*-mamx-bf16 -mavx512fp16 -DGCI_ISA=avx512fp16", flags)
    names = "baseline avx2 avx512 avx512bf16 amx avx512fp16"
    environment = os.environ | {"GCI_CPU_ISA": "baseline"}
    command = [str(folder / "main")]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == f"{names} uses baseline 1\n"
    environment["GCI_CPU_ISA"] = "avx512fp16"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    has_it = re.search(r"\bavx512_fp16\b", Path("/proc/cpuinfo").read_text())
    assert done.stdout == f"{names} uses avx512fp16 1\n" if has_it else "allowed: baseline" in done.stderr


NEW_KERNEL = """
import sysconfig

link = compile_only("scale_rows", build_cpu.binding_objects(compiler, folder))
name = "gci_kernels/_native" + sysconfig.get_config_var("EXT_SUFFIX")
subprocess.run([*link, "-shared", "-o", name], check=True)
"""

USE_KERNEL = """
import torch
from gci_kernels.ops.scale_rows.native import forward

wide, factors = torch.full((7, 45), float("nan")), torch.randn(7)
wide[:, :37] = torch.randn(7, 37)
assert torch.equal(forward(wide[:, :37], factors), wide[:, :37] * factors[:, None])
"""


def test_add_a_kernel_in_cpp(tmp_path):
    """It is compiled for this processor's instruction set, and Python calls it."""
    folder = changed_copy("add_kernel.md", tmp_path, "csrc", "build_cpu.py", "build_ninja.py", "gci_kernels")
    for old in (folder / "gci_kernels").glob("_native*"):
        old.unlink()
    (folder / "built" / "made").mkdir(parents=True)
    (folder / "built" / "made" / "cuda_build.h").write_text('#define GCI_CUDA_BUILD "not built: an example"\n')
    run(folder, "-c", BUILD + NEW_KERNEL)
    run(folder, "-c", USE_KERNEL)


CHECK_KERNEL = """
import sys
import torch
from gci_kernels import hardware
from gci_kernels.hardware import self_check

assert "scale_rows" in hardware.names("triton") and "gci_kernels.ops.scale_rows.triton" not in sys.modules
assert len(hardware.digest("scale_rows")) == 64
options = dict(dtypes=(torch.float32, torch.float16), shapes=(self_check.ODD,))
checks = list(self_check.check_kernel("scale_rows", torch.device("cpu"), **options))
assert len(checks) == 8 and all(check.passed for check in checks), checks
"""


def test_add_a_kernel_in_triton(tmp_path):
    """It is registered without Triton being imported, and its check passes, interpreted."""
    folder = changed_copy("add_kernel.md", tmp_path, "csrc", "build_cpu.py", "gci_kernels")
    run(folder, "-c", CHECK_KERNEL, TRITON_INTERPRET="1")
