"""`python -m bench.gpu --bundle FILE`: what is packed, and what is said where something is missing."""

import os
import re
import shutil
import subprocess
import sysconfig
import tarfile
from pathlib import Path

import pytest

from gci_kernels import native
from gci_kernels.bench import gpu, gpu_bundle

RUNNING = gpu_bundle._RUNNING


@pytest.fixture
def tree(tmp_path) -> Path:
    """A checkout of three files: one committed, one new, one ignored; and one that is deleted."""
    root = tmp_path / "tree"
    (root / "gci_kernels").mkdir(parents=True)
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@x"]
    (root / ".gitignore").write_text("*.so\n")
    for name in ("known.py", "deleted.py"):
        (root / "gci_kernels" / name).write_text("")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    (root / "gci_kernels" / "deleted.py").unlink()
    for name in ("new.py", "_native.so"):
        (root / "gci_kernels" / name).write_text("")
    return root


@pytest.fixture
def extension(tmp_path) -> Path:
    """A file with the name of a built extension."""
    path = tmp_path / f"_native{gpu_bundle.suffix('3.12')}"
    path.write_bytes(b"built")
    return path


def bundle(tree: Path, *options: object) -> tuple[int, Path]:
    """The exit status, and the archive."""
    file = tree.parent / "made" / "x.tar.gz"
    args = gpu.parse(["--bundle", str(file), *map(str, options)])
    return gpu_bundle.main(args, tree), file


def test_what_is_packed(tree, extension, tmp_path, monkeypatch, capsys):
    def download(requirement, folder, *, target):
        assert target[:2] == ["--python-version", "3.12"] and "manylinux_2_28_x86_64" in target
        wheel = folder / f"{requirement.replace('==', '-')}-py3-none-any.whl"
        wheel.write_text("")
        return wheel

    monkeypatch.setattr(gpu_bundle, "pip_download", download)
    status, file = bundle(tree, "--python", "3.12", "--extension", extension, "--wheels", "peft==0.21.2")
    said = capsys.readouterr().out
    assert status == 0, said
    with tarfile.open(file) as archive:
        names = archive.getnames()
        folder = names[0].split("/")[0]
        readme = archive.extractfile(f"{folder}/README-first.txt").read().decode()
    inside = {name.removeprefix(f"{folder}/") for name in names}
    assert inside == {
        ".gitignore", "gci_kernels/known.py", "gci_kernels/new.py", f"gci_kernels/{extension.name}",
        "wheels/peft-0.21.2-py3-none-any.whl", "README-first.txt",
    }  # fmt: skip
    sha = subprocess.run(["git", "-C", tree, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert folder == f"gci_kernels-{sha[:10]}" and f"GCI_COMMIT={sha}-changed python -m bench.gpu --out" in readme
    assert "--profile" in readme and "wheels/*.whl" in readme and readme in said


def test_an_extension_may_be_left_out(tree, capsys):
    status, file = bundle(tree, "--python", "9.9", "--no-extension")
    with tarfile.open(file) as archive:
        assert status == 0 and not [name for name in archive.getnames() if "_native" in name]
    assert "each command compiles it" in capsys.readouterr().out


def test_too_large_a_bundle_names_its_largest_parts(tree, extension, monkeypatch, capsys):
    (tree / "large.bin").write_bytes(os.urandom(300_000))
    monkeypatch.setattr(gpu_bundle, "LIMIT", 200_000)
    status, file = bundle(tree, "--python", "3.12", "--extension", extension)
    said = capsys.readouterr().err
    assert status == 1 and not file.exists()
    assert "0.3 MB are more than 0 MB; the largest parts: large.bin 0.3 MB" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--python", "9.9"], "the extension for Python 9.9 needs its headers: there is no python9.9 in PATH"),
        (["--python", "9.9", "--python-headers", "."], "lacks Python.h, pyconfig.h or patchlevel.h of Python 9.9"),
        (
            ["--python", "9.9", "--python-headers", sysconfig.get_path("include")],
            f"headers of Python {RUNNING}, not of",
        ),
        (["--arch", "hopper"], "--arch hopper: it is named like sm_90a"),
        (["--python", "3.13", "--extension", "{extension}"], "Python 3.13 loads _native.cpython-313-"),
        (["--extension", "nowhere"], "--extension nowhere: there is no such file"),
        (["--python", "3.12", "--extension", "{extension}", "--wheels", "peft"], "--wheels peft: name a version"),
    ],
)
def test_what_is_missing_is_said(tree, extension, capsys, options, words):
    status, file = bundle(tree, *(option.format(extension=extension) for option in options))
    assert status == 1 and words in capsys.readouterr().err and not file.exists()


def test_only_a_checkout_is_packed(tmp_path, extension, capsys, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "plain"
    folder.mkdir()
    status, _ = bundle(folder, "--python", "3.12", "--extension", extension)
    assert status == 1 and "is no checkout of git" in capsys.readouterr().err


def test_architectures():
    assert [gpu_bundle.capability(name) for name in ("sm_90a", "sm_80", "sm_120")] == ["9.0a", "8.0", "12.0"]


@pytest.fixture
def small_sources(tmp_path, monkeypatch) -> Path:
    """A setup.py in place of the package's, which compiles one file as that does, with the headers that it is given."""
    root = tmp_path / "sources"
    (root / "gci_kernels").mkdir(parents=True)
    code = (
        '#include <Python.h>\nconst char version[] = PY_VERSION;\nextern "C" PyObject* PyInit__native() { return 0; }\n'
    )
    (root / "native.cpp").write_text(code)
    (root / "setup.py").write_text("""
import os, shlex, subprocess, sysconfig
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
assert os.environ["GCI_BUILD_CUDA"] == "1" and os.environ["GCI_CUDA_ARCH_LIST"] == "9.0a"
class Build(build_ext):
    def build_extension(self, ext):
        os.makedirs(self.build_temp, exist_ok=True)
        made = os.path.join(self.build_temp, "native.o")
        flags = shlex.split(os.environ.get("CPPFLAGS", ""))
        command = ["c++", "-fPIC", *flags, "-isystem", sysconfig.get_path("include"), "-c", "native.cpp", "-o", made]
        subprocess.run(command, check=True)
        ext.extra_objects = [made]
        super().build_extension(ext)
setup(name="x", packages=[], ext_modules=[Extension("gci_kernels._native", [], language="c++")], cmdclass={"build_ext": Build})
""")  # noqa: E501
    monkeypatch.setattr(gpu_bundle, "ROOT", root)
    return root


def test_an_extension_is_compiled_with_the_headers_of_another_python(tree, small_sources, tmp_path):
    """Which are this one's, with another number."""
    headers, own = tmp_path / "headers", Path(sysconfig.get_path("include"))
    shutil.copytree(own, headers)
    shutil.copy(sysconfig.get_config_h_filename(), headers)
    text = (headers / "patchlevel.h").read_text()
    text = re.sub(r"(define PY_MINOR_VERSION\s+)\d+", r"\g<1>77", text)
    text = re.sub(r'(define PY_VERSION\s+)".*"', r'\g<1>"3.77.0"', text)
    (headers / "patchlevel.h").write_text(text)
    status, file = bundle(tree, "--python", "3.77", "--python-headers", headers)
    assert status == 0
    with tarfile.open(file) as archive:
        (name,) = [name for name in archive.getnames() if "_native" in name]
        built = archive.extractfile(name).read()
    assert name.endswith("gci_kernels/_native.cpython-377-x86_64-linux-gnu.so") and b"3.77.0" in built


def test_what_a_compiler_says_is_shown(tree, small_sources, capsys):
    (small_sources / "native.cpp").write_text("#error no such thing\n")
    status, _ = bundle(tree)
    assert status == 1 and "csrc was not built: " in capsys.readouterr().err
    assert native.available()
