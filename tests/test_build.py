"""The build: what a wheel holds, what it links, and what someone without a compiler reads."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what the build reads, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("csrc", "gci_kernels", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", *(path.name for path in ROOT.glob("*.py"))):
        shutil.copy(ROOT / name, folder)
    return folder


def build(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess:
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(out)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def archive(source, tmp_path_factory) -> Path:
    """The source archive."""
    folder = tmp_path_factory.mktemp("archive")
    backend = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    copied = folder / "source"  # setuptools leaves its notes beside what it packs
    shutil.copytree(source, copied)
    for name in ("constraints.txt", "tests"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, copied / name)
    subprocess.run([sys.executable, "-c", backend], cwd=copied, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(archive, tmp_path_factory) -> Path:
    """What the source archive builds: minutes, so once."""
    folder = tmp_path_factory.mktemp("wheel")
    done = build(archive, folder, GCI_CUDA_ARCH_LIST="9.0a")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.whl"))


def test_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (extension,) = (name for name in names if name.startswith("gci_kernels/_native") and name.endswith(".so"))
        archive.extract(extension, tmp_path)
    assert {"gci_kernels/py.typed", "gci_kernels/bench/command.py", "gci_kernels/patching/patch.py"} <= set(names)
    results = {f"gci_kernels/bench/results/{path.name}" for path in (ROOT / "bench" / "results").glob("*.json")}
    assert results and results <= set(names), "docs and README show them"
    packages = {str(Path(name).parent) for name in names if name.endswith(".py")}
    shipped = {str(p.parent.relative_to(ROOT)).replace("bench", "gci_kernels/bench") for top in ("gci_kernels", "bench")
               for p in (ROOT / top).rglob("__init__.py")}  # fmt: skip
    assert packages == shipped, "pyproject.toml lists the packages by hand"
    done = subprocess.run(["readelf", "-d", tmp_path / extension], check=True, capture_output=True, text=True)
    needed = {line.split("[")[1].split(".so")[0] for line in done.stdout.splitlines() if "(NEEDED)" in line}
    needed -= {"libstdc++", "libm", "libgomp", "libgcc_s", "libc", "libdl", "librt", "libpthread"}
    assert all(name.startswith("ld-linux") for name in needed), "neither torch nor CUDA: it serves all versions of both"


SMOKE = """
import itertools, sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gci_kernels
from gci_kernels import native
from gci_kernels.proof import verify
from gci_kernels.bench import command

folder = Path(sys.prefix).resolve()
for module in (gci_kernels, native.extension(), command):
    assert folder in Path(module.__file__).resolve().parents, module
checks = [check for group in itertools.islice(verify.verify("cpu"), 9) for check in group]
assert len(checks) > 9 and all(check.passed for check in checks)
config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
model = gci_kernels.patch(LlamaForCausalLM(config), gci_kernels.LoRAMoEConfig(init_weights=False))
ids = torch.tensor([[3, 5, 7]])
model(input_ids=ids, labels=ids).loss.backward()
assert all(each.grad.isfinite().all() for each in model.parameters() if each.requires_grad)
assert model.eval().generate(input_ids=ids, max_new_tokens=2, eos_token_id=None).shape == (1, 5)
print(gci_kernels.report(model))
"""


def test_the_source_archive_is_whole(archive):
    with tarfile.open(archive) as members:
        names = {name.partition("/")[2] for name in members.getnames()}
    kinds = (".py", ".cpp", ".cu", ".cuh", ".h", ".json", ".safetensors")
    tracked = {str(path.relative_to(ROOT)) for top in ("csrc", "bench", "tests", "gci_kernels")
               for path in (ROOT / top).rglob("*.*") if path.suffix in kinds
               and "__pycache__" not in path.parts}  # fmt: skip
    assert tracked <= names, "the tests of a distribution run from its source archive"


def test_installed_from_the_sdist(wheel, tmp_path):
    """What the source archive builds works where there is nothing else of the project."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    # The dependencies are this environment's; a path file takes no note of other path files, nor of their hooks.
    (own,) = environment.glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    install = ["-m", "pip", "-q", "--python", str(python), "install", "--no-deps", "--no-index", "-I", str(wheel)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)

    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    outside = dict(cwd=tmp_path, env=variables, capture_output=True, text=True)
    script = environment / "bin" / "gci-kernels"
    for command in ([script, "info"], [python, "-m", "gci_kernels", "info"], [python, "-c", SMOKE]):
        done = subprocess.run(command, **outside)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "LoRAMoE 8x4" in done.stdout


@pytest.mark.parametrize(("compiler", "why"), [("/nonexistent/c++", "No such file"), ("false", "")])
def test_missing_compiler_gives_one_clear_message(source, tmp_path, compiler, why):
    done = build(source, tmp_path, CXX=compiler)
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert output.count("no working C++17 compiler with OpenMP was found") == 1, output
    assert "apt-get install g++" in output and why in output
    assert "Traceback" not in output


def test_triton_is_required_where_there_are_packages_of_it():
    """Of this package as it is installed; GPUs of NVIDIA stand beside Arm processors too."""
    required = next(r for r in map(Requirement, requires("gci_kernels")) if r.name == "triton")
    machines = {"Linux": ("x86_64", "aarch64"), "Darwin": ("arm64",), "Windows": ("AMD64",)}
    for system, names in machines.items():
        for machine in names:
            environment = {"platform_system": system, "platform_machine": machine, "extra": ""}
            assert required.marker.evaluate(environment) == (system == "Linux"), (system, machine)
