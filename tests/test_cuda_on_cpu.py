"""The CUDA kernels compiled for this CPU, their threads as fibers: the tests of test_gpu_decode*.py without a GPU.

What this cannot see: the instructions replaced in tests/cuda_on_cpu, what a memory model permits, and speed.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
FILES = [str(TESTS / name) for name in ("test_gpu_decode.py", "test_gpu_decode_attend.py", "test_gpu_decode_layers.py")]


def test_on_cpu(tmp_path):
    module = tmp_path / ("cuda_on_cpu" + sysconfig.get_config_var("EXT_SUFFIX"))
    folders = [TESTS / "cuda_on_cpu", CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda" / "checks.cpp"]
    sources += [CSRC / "cuda_bindings.cpp", CSRC / "decode_bindings.cpp"]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-x", "c++"]
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # a GPU faults on what is not aligned
    command = [os.environ.get("CXX", "g++"), *flags, *(f"-I{folder}" for folder in folders), *map(str, sources)]
    command += [str(TESTS / "cuda_on_cpu" / "fibers.cpp"), "-o", str(module)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *FILES]
    environment = os.environ | {"GCI_CUDA_ON_CPU": str(module), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *tests], cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    skipped = 2 + 1 + 5 + 12 + 1  # the self check's records, CUDA graphs, compute-sanitizer, transformers' compiler
    assert " passed" in done.stdout and f" {skipped} skipped" in done.stdout, done.stdout[-500:]
