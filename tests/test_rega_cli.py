"""The two commands, and what they say of bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import toy_rega as toy
from transformers import LlamaForCausalLM

import gci_kernels.cli
from gci_kernels import rega
from gci_kernels.bench.models import load_tokenizer
from gci_kernels.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
DISTILL = {
    "--model": "model", "--instructions": "general.txt", "--out": "general.jsonl", "--device": "cpu",
    "--max-new-tokens": "12", "--batch": "3",
}  # fmt: skip
MIX = {"--general": "general.jsonl", "--domain": "law=law.jsonl", "--roles": "roles.json", "--out": "mixture.jsonl"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with its tokenizer, one without a tokenizer, and tokenizers without a system turn or any template."""
    folder = tmp_path_factory.mktemp("saved")
    for name, template in (("model", toy.SYSTEM), ("no-system", toy.RAISES), ("no-template", None)):
        toy.llama().save_pretrained(folder / name)
        toy.tokenizer(template).save_pretrained(folder / name)
    toy.llama().save_pretrained(folder / "no-tokenizer")
    return folder


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    """The working folder, with all that the commands read."""
    monkeypatch.chdir(tmp_path)
    for path in saved.iterdir():
        Path(path.name).symlink_to(path)
    Path("roles.json").write_text(json.dumps({"central": toy.ROLES.central, "domains": dict(toy.ROLES.domains)}))
    Path("general.txt").write_text("\n".join(toy.INSTRUCTIONS))
    words = ("rent", "court", "fever", "sun", "cold")
    pairs = [{"instruction": f"what is {word}", "answer": "the law"} for word in words]
    Path("law.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    Path("health.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return tmp_path


def run(command: str, options: dict, *more: str) -> int:
    return main(["rega", command, *(part for option in options.items() for part in option), *more])


def rows(text: str) -> dict[str, list[str]]:
    """A table's rows by their first cells."""
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in text.splitlines() if "│" in line]
    return {first: rest for first, *rest in cells}


@pytest.mark.smoke
def test_distill(folder, capsys):
    assert run("distill", DISTILL, "--roles", "roles.json", "--seed", "4") == 0
    found = rega.read_distilled("general.jsonl")
    expected = rega.distill(
        LlamaForCausalLM.from_pretrained("model").float(), toy.tokenizer(), toy.INSTRUCTIONS, prompt=toy.ROLES.central,
        max_new_tokens=12, batch_size=3, seed=4, progress=False,
    )  # fmt: skip
    assert found == expected
    table, records = rows(capsys.readouterr().out), rega.distilled.read_records("general.jsonl")
    dropped = [record["dropped"] for record in records]
    assert table["kept"] == [str(len(found))] and 0 < len(found) < 7
    assert table["dropped: empty"] == [str(dropped.count("empty"))]
    assert table["dropped: repeated"] == [str(dropped.count("repeated"))]
    cut = sum(not record["finished"] for record in records if record["dropped"] is None)
    assert table["kept, but cut off at --max-new-tokens"] == [str(cut)]


def test_distill_takes_every_option(folder):
    more = "--temperature 0 --top-p 0.5 --limit 5 --dtype float64 --prompt".split() + ["you are a doctor"]
    assert run("distill", DISTILL, *more) == 0
    header = json.loads(Path("general.jsonl").read_text().splitlines()[0])
    expected = dict(count=5, temperature=0.0, top_p=0.5, max_new_tokens=12, prompt="you are a doctor", batch_size=3)
    assert {name: header[name] for name in expected} == expected and header["device"] == "cpu"
    before = Path("general.jsonl").read_bytes()
    assert run("distill", DISTILL, *more) == 0 and Path("general.jsonl").read_bytes() == before
    assert run("distill", DISTILL) == 1 and Path("general.jsonl").read_bytes() == before


@pytest.mark.smoke
def test_mix(folder, capsys):
    assert run("distill", DISTILL) == 0
    more = ["--domain", "health=health.jsonl", "--integration", "0.5", "--seed", "2"]
    assert run("mix", MIX, *more, "--model", "no-system") == 0
    general, domain = rega.read_distilled("general.jsonl"), rega.read_pairs("law.jsonl")[0]
    domains, tokenizer = {"law": domain, "health": domain}, toy.tokenizer(toy.DROPS)
    expected = rega.mixture(general, domains, toy.ROLES, integration=0.5, seed=2, tokenizer=tokenizer)
    assert [json.loads(line) for line in Path("mixture.jsonl").read_text().splitlines()] == expected.examples
    table = rows(capsys.readouterr().out)
    assert table["general"] == ["", str(len(general))] and table["law"] == table["health"] == ["5", "3"]
    assert table["all"] == ["10", str(len(general) + 6)]
    assert run("mix", MIX, *more) == 0
    assert json.loads(Path("mixture.jsonl").read_text().splitlines()[0])["messages"][0]["role"] == "system"


def test_general_pairs_of_ones_own(folder):
    assert run("mix", MIX | {"--general": "health.jsonl"}) == 0
    assert len(Path("mixture.jsonl").read_text().splitlines()) == 5 + 5 + 1


def test_broken_lines_are_told_and_left_out(folder, capsys):
    Path("i.jsonl").write_text('{"instruction": "what is rent"}\n{"instruction": 5}\n\n{\n"why"\n')
    assert run("distill", DISTILL | {"--instructions": "i.jsonl"}) == 0
    assert len(rega.distilled.read_records("general.jsonl")) == 2
    found = capsys.readouterr().err.splitlines()
    assert "i.jsonl:2: instruction must be a string with text in it, got 5" in found
    assert any(line.startswith("i.jsonl:4: not JSON") for line in found)
    with Path("law.jsonl").open("a") as file:
        file.write("\n[]\n")
    assert run("mix", MIX | {"--general": "health.jsonl"}) == 0
    assert capsys.readouterr().err.splitlines() == ["law.jsonl:6: must be an object"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--instructions": "missing.txt"}, "No such file or directory: 'missing.txt'"),
        ({"--instructions": "empty.txt"}, "empty.txt holds no line that can be used"),
        ({"--out": "nowhere/x.jsonl"}, "nowhere/x.jsonl: its folder does not exist"),
        ({"--out": "law.jsonl"}, "law.jsonl is no file of distilled answers"),
        ({"--out": "model"}, "Is a directory"),
        ({"--model": "random-llama"}, "--model random-llama has no tokenizer"),
        ({"--model": "no-tokenizer"}, "--model no-tokenizer has no tokenizer"),
        ({"--model": "no-template"}, "the tokenizer has no chat template"),
        ({"--model": "./missing"}, "neither smollm2"),
        ({"--roles": "law.jsonl"}, "law.jsonl: not JSON"),
        ({"--prompt": " "}, "prompt must be a string with text"),
        ({"--temperature": "-1"}, "temperature must be a number that is 0 or above"),
        ({"--top-p": "0"}, "top_p must be above 0"),
        ({"--max-new-tokens": "0"}, "max_new_tokens must be a whole number of at least 1"),
        ({"--batch": "0"}, "batch_size must be a whole number of at least 1"),
        ({"--seed": "-1"}, "seed must be a whole number of at least 0"),
        ({"--limit": "0"}, "--limit must be at least 1"),
    ],
)
def test_distill_says_what_is_wrong(folder, capfd, changes, message):
    Path("empty.txt").write_text("\n")
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    assert run("distill", DISTILL | changes) == 1
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--general": "missing.jsonl"}, "No such file or directory: 'missing.jsonl'"),
        ({"--general": "unfinished.jsonl"}, "unfinished.jsonl is unfinished: 3 of 7"),
        ({"--domain": "law=general.txt"}, "general.txt holds no line that can be used; line 1: not JSON"),
        ({"--domain": "law=unfinished.jsonl"}, "read it with read_distilled"),
        ({"--domain": "finance=law.jsonl"}, "domain 'finance' has no role prompt"),
        ({"--roles": "general.txt"}, "general.txt: not JSON"),
        ({"--roles": "missing.json"}, "No such file or directory: 'missing.json'"),
        ({"--integration": "1.5"}, "integration must be from 0 to 1, got 1.5"),
        ({"--seed": "-1"}, "seed must be a whole number"),
        ({"--out": "nowhere/x.jsonl"}, "its folder does not exist"),
        ({"--model": "no-tokenizer"}, "has no tokenizer, and so no chat template"),
        ({"--model": "random-llama"}, "has no tokenizer, and so no chat template"),
        ({"--model": "no-template"}, "the tokenizer has no chat template"),
        ({"--model": "./missing"}, "neither smollm2"),
    ],
)
def test_mix_says_what_is_wrong(folder, capfd, changes, message):
    with pytest.raises(toy.Killed):
        rega.distill(
            toy.llama(), toy.tokenizer(), toy.INSTRUCTIONS, out="unfinished.jsonl", batch_size=3, max_new_tokens=2,
            after=toy.kill_after(3), progress=False,
        )  # fmt: skip
    before = sorted(Path().iterdir())
    assert run("mix", MIX | {"--general": "health.jsonl"} | changes) == 1
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert sorted(Path().iterdir()) == before


def test_a_domain_twice(folder, capsys):
    assert run("mix", MIX | {"--general": "health.jsonl"}, "--domain", "law=health.jsonl") == 1
    assert capsys.readouterr().err == "--domain law is given twice\n"


@pytest.mark.parametrize("text", ["law", "=law.jsonl", "law="])
def test_a_domain_without_a_name_or_file(folder, capsys, text):
    with pytest.raises(SystemExit):
        run("mix", MIX | {"--domain": text})
    assert f"'{text}' is not NAME=FILE" in capsys.readouterr().err


def test_roles_or_a_prompt(folder, capsys):
    with pytest.raises(SystemExit):
        run("distill", DISTILL, "--roles", "roles.json", "--prompt", "x")
    assert "not allowed with" in capsys.readouterr().err


def test_every_command_is_in_the_command_lines_docstring(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    found = re.findall(r"^    (\w+)\s", capsys.readouterr().out, flags=re.M)
    assert gci_kernels.cli.__doc__ == f"The command line: gci-kernels {' | '.join(found)}."


def test_a_tokenizer_alone(folder):
    assert load_tokenizer("model").chat_template == toy.SYSTEM
    assert load_tokenizer("random-llama:8b") is None and load_tokenizer("no-tokenizer") is None


def test_it_needs_no_kernel():
    """The package stands beside the kernels and the tuners: its modules import none of them."""
    for path in Path(rega.__file__).parent.glob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) (gci_kernels[\w.]*)", path.read_text(), flags=re.M)
        allowed = tuple(f"gci_kernels.{name}" for name in ("rega", "progress", "files", "models"))
        assert all(name.startswith(allowed) for name in imported), path


def test_python_m(folder):
    done = subprocess.run(
        [sys.executable, "-m", "gci_kernels", "rega", "mix", "--help"], capture_output=True, text=True, check=True
    )
    assert "--integration" in done.stdout
