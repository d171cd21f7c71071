"""`--register FILE`: files that bring a method, and files that cannot."""

import sys

import pytest

import gci_kernels
from gci_kernels.cli import registering
from gci_kernels.tuners import METHODS

METHOD = """
from dataclasses import dataclass
from typing import ClassVar
import torch
import gci_kernels

@dataclass
class {name}Config(gci_kernels.BottleneckConfig):
    method: ClassVar[str] = "{name}"

gci_kernels.register(gci_kernels.Method(
    {name}Config, gci_kernels.Mixer("mix of {name}", lambda h, w, call: 2 * h),
    lambda c, i, o: dict(A=torch.randn(c.r, i), B=torch.randn(o, c.r)), lambda c: "", {name}Config(r=2),
))
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file of this text under this path; what such files register and import is forgotten behind the test."""
    methods, modules = set(METHODS), set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def written(path: str, text: str) -> str:
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return str(file)

    yield written
    for name in METHODS.keys() - methods:
        gci_kernels.unregister(name)
    for name in sys.modules.keys() - modules:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.mark.parametrize("option", ("--register {}", "--register={}", "--reg {}"))
def test_every_spelling_of_the_option(write, option: str):
    path = write("mine.py", METHOD.format(name="Mine"))
    registering.register_files(["verify", "--device", "cpu", *option.format(path).split()])
    assert "Mine" in METHODS


def test_files_whose_names_are_taken(write):
    """By a module of the standard library, or by each other."""
    paths = [write("a/json.py", METHOD.format(name="One")), write("b/adapter.py", METHOD.format(name="Two"))]
    paths.append(write("c/adapter.py", METHOD.format(name="Three")))
    registering.register_files(["bench", *(part for path in paths for part in ("--register", path))])
    assert {"One", "Two", "Three"} <= METHODS.keys()
    assert len({METHODS[name].config.__module__ for name in ("One", "Two", "Three")}) == 3


def test_a_file_imports_what_lies_beside_it(write):
    write("parts_of_mine.py", "NAME = 'Mine'")
    path = write("mine.py", "import parts_of_mine\n" + METHOD.format(name="Mine"))
    registering.register_files(["bench", "--register", path])
    assert "Mine" in METHODS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\n", "mine.py: it registers no method; it has to call gci_kernels.register"),
        ("x = 1\ny = missing\n", "mine.py, line 2: NameError: name 'missing' is not defined"),
        ("x = 1\n\ndef (:\n", "mine.py, line 3: SyntaxError: "),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(write, text: str, says: str):
    with pytest.raises(SystemExit, match=says):
        registering.register_files(["verify", "--register", write("mine.py", text)])


def test_no_file(write, tmp_path):
    with pytest.raises(SystemExit, match="this is no Python file"):
        registering.register_files(["verify", "--register", str(tmp_path / "gone.py")])


def test_debug_shows_where_the_file_fails(write, monkeypatch):
    monkeypatch.setenv("GCI_DEBUG", "1")
    with pytest.raises(NameError, match="missing"):
        registering.register_files(["verify", "--register", write("mine.py", "missing")])


def test_other_commands_have_no_such_option(write):
    registering.register_files(["info", "--register", write("mine.py", METHOD.format(name="Mine"))])
    assert "Mine" not in METHODS
