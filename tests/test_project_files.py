"""The files around the code: what CI, pre-commit, GitHub and those who cite or contribute read."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import gci_kernels

ROOT = Path(__file__).resolve().parents[1]
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def section(name: str, text: str = (ROOT / "pyproject.toml").read_text()) -> str:
    """A table of pyproject.toml, as text: Python 3.10 has no parser of TOML."""
    return text.partition(f"\n[{name}]\n")[2].partition("\n[")[0]


def test_the_citation_is_valid():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["title"] == gci_kernels.__name__ and citation["message"]
    assert citation["version"] == gci_kernels.__version__
    assert citation["authors"] == [{"name": "gci_kernels contributors"}]
    assert f'license = "{citation["license"]}"' in section("project")
    # All that the format knows and this file uses.
    known = {"abstract", "authors", "cff-version", "keywords", "license", "message", "title", "type", "version"}
    assert set(citation) <= known | {"date-released"}


def test_the_changelog_has_its_form():
    """Keep a Changelog: the newest version first, each with sections of the known names, none of them empty."""
    assert CHANGELOG.startswith("# Changelog\n") and gci_kernels.__version__ in CHANGELOG
    versions = re.findall(r"^## (.+)$", CHANGELOG, flags=re.M)
    released = [
        re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d", each) for each in versions if each != "[Unreleased]"
    ]
    assert all(released) and versions.index("[Unreleased]") == 0
    numbers = [Version(each[1]) for each in released]
    assert numbers == sorted(numbers, reverse=True)
    for part in re.split(r"^### ", CHANGELOG, flags=re.M)[1:]:
        assert re.match(r"(Added|Changed|Deprecated|Removed|Fixed|Security)\n\n(.+\n\n)?- ", part), part


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms(path):
    """What GitHub requires of a form; it shows none where one of these is wrong."""
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= set(form) <= {"name", "description", "body", "labels", "title"}
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[\w-]+", name) for name in ids)
    for field in form["body"]:
        assert set(field) <= {"type", "id", "attributes", "validations"} and field["attributes"]["label"]
        assert field["type"] in ("textarea", "dropdown")
        if field["type"] == "dropdown":  # YAML reads a bare yes as a truth value, which GitHub refuses
            assert all(type(option) is str for option in field["attributes"]["options"])


def test_the_workflow_runs_ci_on_every_supported_python():
    (job,) = WORKFLOW["jobs"].values()
    versions = job["strategy"]["matrix"]["python"]
    assert all(type(version) is str for version in versions), "3.10 without quotes is the number 3.1"
    assert versions[0] == re.search(r'requires-python = ">=(.+)"', section("project"))[1]
    assert f"Python {versions[0]} to {versions[-1]}," in (ROOT / "CONTRIBUTING.md").read_text()
    assert versions == [f"3.{minor}" for minor in range(10, 10 + len(versions))]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    (setup,) = (step for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert setup["with"]["python-version"] == "${{ matrix.python }}" and setup["with"]["cache"] == "pip"
    assert all((ROOT / name).is_file() for name in setup["with"]["cache-dependency-path"].split())


def test_ci_checks_style_and_types_before_the_tests():
    run = (ROOT / ".ci/run").read_text()
    order = ["bash .ci/style", '-c "$install"', ".venv/bin/mypy\n", '-c "$tests"', "mkdocs build"]
    assert [run.count(part) for part in order] == [1] * len(order)
    assert sorted(order, key=run.index) == order
    text = (ROOT / "README.md").read_text().partition("<!-- test command -->")[2].partition("<!-- end -->")[0]
    assert text.strip("`\n").rpartition(" && ")[2].startswith(".venv/bin/pytest "), "$tests is the command's last part"
    for script in (ROOT / ".ci").iterdir():
        assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_pre_commit_runs_what_ci_runs():
    """Hooks without versions of their own: the scripts take those of constraints.txt."""
    (repository,) = HOOKS
    assert repository["repo"] == "local"
    scripts = (ROOT / ".ci/run").read_text().splitlines()
    for hook in repository["hooks"]:
        assert hook["language"] == "system" and "additional_dependencies" not in hook
        assert hook["entry"] in scripts


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def test_every_tool_and_test_package_is_pinned():
    """In constraints.txt, to a version that pyproject.toml allows."""
    (style,) = re.findall(r"pip install -q -c constraints.txt (.+)", (ROOT / ".ci/style").read_text())
    quoted = re.findall(r'"([A-Za-z][\w.-]*(?:\[\w+\])?[<>=][^"]*)"', section("project.optional-dependencies"))
    wanted = [Requirement(text) for text in (*style.split(), *quoted)]
    assert {"ruff", "clang-format", "import-linter"} < {each.name for each in wanted} and len(wanted) > 15
    for requirement in wanted:
        found = [pin for pin in pins() if canonicalize_name(pin.name) == canonicalize_name(requirement.name)]
        assert found, f"{requirement.name} is not in constraints.txt"
        for pin in found:
            (exact,) = pin.specifier
            assert exact.operator == "==" and requirement.specifier.contains(exact.version), f"{pin}: {requirement}"


def test_pins_stand_once_and_in_order():
    names = [canonicalize_name(pin.name) for pin in pins() if pin.marker is None or pin.marker.evaluate()]
    assert len(names) == len(set(names))
    written = [pin.name for pin in pins()]
    assert written == sorted(written, key=canonicalize_name)


def test_the_comment_of_clang_formats_settings_names_its_version():
    (pin,) = (str(next(iter(pin.specifier)).version) for pin in pins() if pin.name == "clang-format")
    assert f"clang-format {Version(pin).major}," in (ROOT / ".clang-format").read_text()
