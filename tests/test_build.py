"""The build: what a wheel holds, what it links, and what someone without a compiler reads."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what the build reads, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("csrc", "gci_kernels", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "build_cuda.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess:
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(out)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_wheel(source, tmp_path):
    done = build(source, tmp_path, GCI_CUDA_ARCH_LIST="9.0a")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (extension,) = (name for name in names if name.startswith("gci_kernels/_native") and name.endswith(".so"))
        archive.extract(extension, tmp_path)
    assert {"gci_kernels/py.typed", "gci_kernels/bench/run.py", "gci_kernels/patch.py"} <= set(names)
    results = {f"gci_kernels/bench/results/{path.name}" for path in (ROOT / "bench" / "results").glob("*.json")}
    assert results and results <= set(names), "hardware.py reads which kernels are proved from them"
    packages = {str(Path(name).parent) for name in names if name.endswith(".py")}
    shipped = {str(p.parent.relative_to(ROOT)).replace("bench", "gci_kernels/bench") for top in ("gci_kernels", "bench")
               for p in (ROOT / top).rglob("__init__.py")}  # fmt: skip
    assert packages == shipped, "pyproject.toml lists the packages by hand"
    done = subprocess.run(["readelf", "-d", tmp_path / extension], check=True, capture_output=True, text=True)
    needed = {line.split("[")[1].split(".so")[0] for line in done.stdout.splitlines() if "(NEEDED)" in line}
    needed -= {"libstdc++", "libm", "libgomp", "libgcc_s", "libc", "libdl", "librt", "libpthread"}
    assert all(name.startswith("ld-linux") for name in needed), "neither torch nor CUDA: it serves all versions of both"


@pytest.mark.parametrize(("compiler", "why"), [("/nonexistent/c++", "No such file"), ("false", "")])
def test_missing_compiler_gives_one_clear_message(source, tmp_path, compiler, why):
    done = build(source, tmp_path, CXX=compiler)
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert output.count("no working C++17 compiler with OpenMP was found") == 1, output
    assert "apt-get install g++" in output and why in output
    assert "Traceback" not in output
