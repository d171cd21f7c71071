"""Which part may import which: the contracts of pyproject.toml hold, and stop what they are there for."""

import graphlib
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]
LINTER = Path(sys.executable).with_name("lint-imports")


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package as it is installed, bench in it, with the contracts beside it."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "results")
    shutil.copytree(ROOT / "gci_kernels", tmp_path / "gci_kernels", ignore=ignore)
    shutil.copytree(ROOT / "bench", tmp_path / "gci_kernels/bench", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path / "gci_kernels"


def lint(package: Path) -> subprocess.CompletedProcess:
    return subprocess.run([LINTER, "--no-cache"], cwd=package.parent, capture_output=True, text=True)


def add(path: Path, line: str) -> None:
    """Puts an import into a function of a module, which may be a new one."""
    with path.open("a") as file:
        file.write(f"\n\ndef late() -> None:\n    {line}\n")


@pytest.mark.smoke
def test_the_contracts_are_kept(package):
    done = lint(package)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line", "error"),
    [
        ("ops/upcast.py", "from gci_kernels.tuners import base", "gci_kernels.ops.upcast -> gci_kernels.tuners.base"),
        ("accuracy.py", "import gci_kernels", "gci_kernels.accuracy -> gci_kernels (l."),
        ("convert/formats.py", "from gci_kernels.bench import timing", "gci_kernels.convert.formats -> gci"),
        ("ops/upcast.py", "import peft", "gci_kernels.ops.upcast -> peft"),
        ("hardware/upcast.py", "import transformers", "gci_kernels.hardware.upcast -> transformers"),
        ("ops/gate/reference.py", "from gci_kernels.ops.gate import triton", "gci_kernels.ops.gate.triton"),
        ("new_part.py", "import math", "gci_kernels.new_part"),
    ],
)  # fmt: skip
def test_an_import_that_is_not_allowed_is_named(package, module, line, error):
    (package / module).parent.mkdir(exist_ok=True)
    add(package / module, line)
    done = lint(package)
    assert done.returncode == 1 and error in done.stdout, done.stdout


@pytest.mark.parametrize("folder", ["models", "bench"])
def test_a_circle_is_found(package, folder):
    for name, other in (("one", "two"), ("two", "one")):
        add(package / folder / f"{name}.py", f"from gci_kernels.{folder} import {other}")
    done = lint(package)
    assert done.returncode == 1 and f"No cycles are allowed in gci_kernels.{folder}." in done.stdout, done.stdout


def test_no_circle_goes_through_a_package_of_its_members():
    """The contract against circles looks at the members of a package, not at what its own __init__.py imports."""
    graph = grimp.build_graph("gci_kernels", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle
