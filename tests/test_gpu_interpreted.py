"""test_gpu.py on CPU tensors, its kernels interpreted: so that no slip of the pen waits for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

from gci_kernels import hardware


def test_interpreted(tmp_path):
    tests = Path(__file__).with_name("test_gpu.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-rs", str(tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tests.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    skipped = len(hardware.names("triton")) + 8  # the self check of each, five times far into memory, three CUDA graphs
    assert " passed" in done.stdout and f" {skipped} skipped" in done.stdout, done.stdout[-500:]
