"""README, docs and other pages: links, names and paths exist, and measured numbers are those of the result files."""

import functools
import importlib
import json
import re
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path

import pytest

from gci_kernels.bench import readme
from gci_kernels.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *PAGES]
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
CODE = re.compile(r"^```.*?^```$", flags=re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)


@functools.cache
def prose(document: Path) -> str:
    return CODE.sub("", document.read_text())


@functools.cache
def anchors(document: Path) -> set[str]:
    """Of its headings, those that GitHub and MkDocs make alike."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(document), flags=re.M):
        plain = re.sub(r"[^\w\s-]", "", unicodedata.normalize("NFKD", heading)).strip().lower()
        if plain.replace(" ", "-") == re.sub(r"[-\s]+", "-", plain):
            found.add(plain.replace(" ", "-"))
    return found


@each_document
def test_links(document):
    for target in LINK.findall(prose(document)):
        if re.match(r"\w+:", target):
            raise AssertionError(f"{target}: links that a test without a network cannot check are not used")
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists() and found.is_relative_to(ROOT), f"{target}: there is no such file"
        if anchor:
            assert anchor in anchors(found), f"{target}: there is no such heading"


@each_document
def test_paths_in_backticks(document):
    """What begins as a path of the project does is one."""
    tops = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    for span in SPAN.findall(prose(document)):
        if re.fullmatch(r"[\w./-]+", span) and (span.split("/")[0] in tops and "/" in span or span in tops):
            assert (ROOT / span).exists(), f"`{span}` does not exist"


@each_document
def test_names_in_backticks(document):
    """Dotted names of the package, whole or as `ops.NAME`, `loki.NAME` and `rega.NAME`, can be looked up."""
    for span in SPAN.findall(prose(document)):
        found = re.match(r"(?:gci_kernels\.)?(?:ops|loki|rega|bench|patch|convert)\.\w+|gci_kernels\.\w+", span)
        if found and not span.endswith((".py", ".json", ".png", ".md")):
            for name in re.findall(r"[\w.]+", found[0]):
                look_up(name if name.startswith("gci_kernels") else f"gci_kernels.{name}")


@pytest.mark.parametrize("name", re.findall(r"^::: (\S+)$", "".join(map(prose, DOCUMENTS)), flags=re.M))
def test_reference(name):
    """What the reference shows exists and has a docstring, and so has all that a module offers."""
    found = look_up(name)
    assert found.__doc__
    for member in getattr(found, "__all__", ()):
        assert getattr(found, member).__doc__, f"{name}.{member}"


@pytest.mark.smoke
def test_everything_public_is_in_the_reference():
    import gci_kernels

    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", "".join(map(prose, DOCUMENTS)), flags=re.M)}
    assert set(gci_kernels.__all__) <= shown


def look_up(name: str) -> object:
    """The object with a dotted name; modules come before what they are imported over by."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{name} is nothing")


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert sum(line.startswith("![") for line in lines) == 1


def test_every_page_is_in_the_navigation():
    named = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(named) == sorted(str(path.relative_to(ROOT / "docs")) for path in PAGES)


def test_every_command_is_described(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    (\w+)\s", capsys.readouterr().out, flags=re.M)
    described = re.findall(r"^\| `gci-kernels (\w+)` \|", (ROOT / "docs/commands.md").read_text(), flags=re.M)
    assert commands and described == commands


def test_every_environment_variable_is_described():
    sources = [path for top in ("gci_kernels", "bench", "csrc") for path in (ROOT / top).rglob("*.*")]
    text = "\n".join(
        path.read_text() for path in [*sources, *ROOT.glob("*.py")] if path.suffix in (".py", ".cpp", ".cu", ".h")
    )
    read = set(re.findall(r'(?:environ\w*(?:\.get)?[\[(]|getenv\()"(GCI_\w+)"', text))
    assert len(read) >= 6
    described = "".join((ROOT / "docs" / name).read_text() for name in ("commands.md", "installation.md"))
    assert not {name for name in read if f"`{name}" not in described}


# Measured numbers


def test_tables_are_those_of_the_result_files():
    documents = readme.documents(ROOT)
    assert {str(path.relative_to(ROOT)) for path in documents} == {
        "README.md", "docs/benchmarks.md", "docs/compatibility.md", "docs/forgetting.md"
    }  # fmt: skip
    for path, text in documents.items():
        assert path.read_text() == text, "python -m bench.readme writes it"


def test_the_picture_is_that_of_the_result_file():
    assert readme.picture_digest(ROOT / readme.PICTURE) == readme.digest(ROOT), "python -m bench.readme draws it"


@pytest.fixture
def checkout(tmp_path):
    """What `bench.readme` reads and writes, with places for every table."""
    (tmp_path / "docs").mkdir()
    (tmp_path / readme.RESULTS).mkdir(parents=True)
    for name in ("cpu.json", "forgetting.json", "compatibility.json"):
        (tmp_path / readme.RESULTS / name).symlink_to(ROOT / readme.RESULTS / name)
    place = "PLACE\n<!-- made by python -m bench.readme: {} -->\nREPLACED\n<!-- end -->\n"
    (tmp_path / "README.md").write_text("".join(map(place.format, readme.CONTENTS)))
    return tmp_path


def test_the_command_writes_tables_and_picture(checkout):
    assert readme.main(["--root", str(checkout)]) == 0
    text = (checkout / "README.md").read_text()
    assert "REPLACED" not in text and text.count("PLACE") == text.count("<!-- end -->") == len(readme.CONTENTS)
    assert readme.picture_digest(checkout / readme.PICTURE) == readme.digest(checkout) is not None
    result = (checkout / readme.SOURCE).read_text()
    (checkout / readme.SOURCE).unlink()
    (checkout / readme.SOURCE).write_text(result + "\n")
    assert readme.picture_digest(checkout / readme.PICTURE) != readme.digest(checkout)


def test_an_unknown_place_is_named(checkout):
    (checkout / "docs" / "page.md").write_text("<!-- made by python -m bench.readme: speed -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="no table 'speed'; known: cpu, all, forgetting"):
        readme.documents(checkout)


@pytest.fixture
def result():
    return json.loads((ROOT / readme.SOURCE).read_text())


def test_one_dtype_and_what_was_left_out(result):
    """A run may hold less than all: nothing is shown of what is not there."""
    for name in ("left_out", "products", "shrunk"):
        result.pop(name, None)
    whole = readme.measured(result)
    assert "left out" not in whole and "in time" not in whole
    result["models"], result["layers"] = result["models"][:1], result["layers"][:1]
    dtype, other = result["models"][0]["dtype"], "float16"
    result["left_out"] = [other]
    shown = readme.measured(result)
    assert "float16 was left out: PyTorch multiplies it slowly on this processor." in shown
    assert f"| train step, tokens/s, {dtype} |" in shown and shown.count("| train step, ") == 1
    result["products"] = {"float32": {"forward": 160.0, "dx": 150.0}, other: {"forward": 39.0, "dx": 2.7}}
    assert "(GFLOP/s of PyTorch's product: float16 2.70, float32 150)" in readme.measured(result)
    result["shrunk"] = [{"dtype": "float32", "what": "training", "wanted": "2x256", "used": "2x128"}]
    assert "To end in time, float32 training: 2x128 instead of 2x256." in readme.measured(result)


def test_parts_that_may_be_missing(result):
    for model in result["models"]:
        model["train"]["peak_memory"]["eager"] = None
        for part in ("generate", "generate_many"):
            model.pop(part, None)
    result["layers"], result["commit"] = [], None
    shown = readme.measured(result)
    assert "generation" not in shown and " layer, " not in shown and "commit" not in shown
    (memory,) = (line for line in shown.splitlines() if line.startswith("| peak memory of a train step, float32"))
    assert memory.split(" | ")[2] == ""


def test_rounds_are_those_of_the_samples(result):
    for part in (*result["layers"], *(model[part] for model in result["models"] for part in ("train", "generate"))):
        for timing in part["seconds"].values():
            timing["samples"] = [1.0] * 7
    for model in result["models"]:
        model.pop("generate_many", None)
    assert "Medians of 7 interleaved rounds." in readme.measured(result)
    result["models"][0]["train"]["seconds"]["gci"]["samples"] = [1.0, 1.0]
    assert "Medians of 2 to 7 interleaved rounds." in readme.measured(result)


def test_numbers_of_the_table(result):
    """Against the file, by hand: a median, a size and a tax."""
    rows = {line.split(" | ")[0].strip("| "): line for line in readme.measured(result).splitlines() if "|" in line}
    model, layer = result["models"][0], result["layers"][0]
    rate = rows[f"train step, tokens/s, {model['dtype']}"].strip("| ").split(" | ")
    assert float(rate[3].replace(",", "")) == pytest.approx(
        model["train"]["tokens_per_second"]["gci"]["median"], rel=5e-3
    )
    kept = rows[f"kept for backward by the adapters, a token, {model['dtype']}"].strip("| ").split(" | ")
    value, unit = kept[-1].split()
    assert float(value.replace(",", "")) * 1024 ** ["B", "KiB", "MiB"].index(unit) == pytest.approx(
        model["train"]["saved_by_adapters"]["gci"], rel=5e-3
    )
    (tax,) = (line for label, line in rows.items() if label.startswith("one ") and layer["case"]["dtype"] in label)
    assert tax.endswith(f"| {layer['tax']['gci']['median']:.2f} |")


@pytest.mark.parametrize(
    "size, text", [(0, "0.00 B"), (999, "999 B"), (1000, "0.98 KiB"), (262_144, "256 KiB"), (5 << 30, "5.00 GiB")]
)
def test_sizes(size, text):
    assert readme._size(size) == text


def test_forgetting_table_is_that_of_the_report():
    """The documentation's table and the report's, made at different times, have the same numbers."""
    report = (ROOT / "bench/results/forgetting.md").read_text()
    full = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in report.split("\n## ")[0].splitlines()}
    short = readme.documents(ROOT)[ROOT / "docs/forgetting.md"]
    rows = [line.strip("| ").split(" | ") for line in short.splitlines() if re.match(r"\| .*M \| ", line)]
    compared = [row for row in rows if f"| {row[0]}" in full]
    assert len(compared) == 9
    for row in compared:
        assert row[1:5] == [full[f"| {row[0]}"][column] for column in (1, 4, 5, 6)]


# What is shipped


def test_the_source_archive_has_the_documentation(tmp_path):
    """Made of the files that git tracks in docs, and little else."""
    source = tmp_path / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            (source / path.name).write_bytes(path.read_bytes())
    for name in ("docs", "gci_kernels", "bench"):
        (source / name).symlink_to(ROOT / name)
    backend = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", backend], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        names = {name.partition("/")[2] for name in members.getnames()}
    assert {"mkdocs.yml", "docs/_site.py", *(name for name in IDS)} <= names
