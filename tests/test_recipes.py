"""README and docs: their Python blocks run, and the command line accepts their commands.

The blocks of a page run in order, in one namespace, in which `path` is the folder of a tiny Llama. The working folder
holds the files that they read.
"""

import argparse
import importlib.util
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
import toy_rega
from peft import get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import gci_kernels
from gci_kernels.cli import main
from gci_kernels.tuners import FusedLoraLinear

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
PAGES = (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")))
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)


def blocks(document: str, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(DOCUMENTS[document]) if language in languages]


PYTHON = [document for document in DOCUMENTS if blocks(document, "python")]
LINES = [
    (document, line.split("#")[0].strip())
    for document in DOCUMENTS
    for block in blocks(document, "sh", "")
    for line in block.splitlines()
]
COMMANDS = [
    (document, command) for document, line in LINES for command in re.findall(r"(?:^|/|\s)gci-kernels (.+)", line)
]
MODULE = re.compile(r"python -m (bench[.\w]+)")
MODULES = sorted({(document, name) for document, text in DOCUMENTS.items() for name in MODULE.findall(text)})
WORDS = toy_rega.SPECIAL + toy_rega.WORDS + "shall may find clause void law and due".split()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the model, its tokenizer, two adapters, and the texts that pages read."""
    folder = tmp_path_factory.mktemp("recipes")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        chat_template=toy_rega.SYSTEM,
    ).save_pretrained(folder / "model")  # fmt: skip
    for name in ("law", "medicine"):
        adapter = gci_kernels.LoRAMoEConfig(r=4, num_experts=2, init_weights=False)
        get_peft_model(LlamaForCausalLM(config), adapter).save_pretrained(folder / f"{name}-adapter")
    sentence = "the tenant shall pay the rent and a court may find the clause void".split()
    lines = [" ".join(sentence[(row + step) % len(sentence)] for step in range(5 + row % 4)) for row in range(24)]
    for name in ("law.txt", "general.txt"):
        (folder / name).write_text("\n".join(lines) + "\n")
    pairs = [{"instruction": text, "answer": "the law"} for text in toy_rega.INSTRUCTIONS]
    (folder / "law.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    roles = {"central": toy_rega.ROLES.central, "domains": dict(toy_rega.ROLES.domains)}
    (folder / "roles.json").write_text(json.dumps(roles))
    return folder


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch):
    """The working folder: links to what was prepared, which nothing writes to."""
    monkeypatch.chdir(tmp_path)
    for path in prepared.iterdir():
        Path(path.name).symlink_to(path)
    return tmp_path


def test_blocks_say_what_they_are():
    """Python, shell, a change of the sources, or nothing for a program's input; each language has its test."""
    languages = {language for text in DOCUMENTS.values() for language, _ in FENCE.findall(text)}
    assert languages <= {"python", "sh", "diff", "py", ""}  # "py": a fragment, which is not run
    assert len(PYTHON) >= 9 and len(COMMANDS) >= 10
    for document, text in DOCUMENTS.items():
        assert text.count("```") == 2 * len(FENCE.findall(text)), f"{document}: a fence is open, or indented"


@pytest.mark.parametrize("document", PYTHON)
def test_python(document, folder, capsys):
    names = {"path": "model"}
    for number, block in enumerate(blocks(document, "python"), start=1):
        exec(compile(block, f"{document}, block {number}", "exec"), names)
    if document in RESULTS:
        RESULTS[document](names, capsys.readouterr().out)


def loramoe(names: dict, out: str) -> None:
    """It has learned, saved the adapter alone, and the balance constraint is part of the loss."""
    history = names["trainer"].state.log_history
    (trained,) = (entry["train_loss"] for entry in history if "train_loss" in entry)
    assert trained < 0.9 * math.log(len(WORDS))  # where nothing is learned, at least the logarithm
    saved = load_file("loramoe-adapter/adapter_model.safetensors")
    assert saved and all("loramoe_" in name for name in saved)
    plain = names["model"](**names["batch"], labels=names["labels"]).loss
    assert names["loss"] > plain


def alora(names: dict, out: str) -> None:
    assert names["answers"].shape[0] == 2 and names["answers"].shape[1] > 6
    assert "the tenant shall" in out


def loki(names: dict, out: str) -> None:
    """Ten percent of each projection's rows have changed, and nothing else."""
    before, after = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("model", "tuned"))
    assert before.keys() == after.keys()
    changed = {name: (before[name] != after[name]).any(-1).sum().item() for name in before}
    assert {name: count for name, count in changed.items() if count} == {
        f"model.layers.{layer}.mlp.down_proj.weight": 3 for layer in (0, 1)
    }


def lora(names: dict, out: str) -> None:
    assert "LoRA r=16" in out
    first, second = (load_file(f"{name}/adapter_model.safetensors") for name in ("lora-adapter", "lora-adapter-2"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert not any(isinstance(module, FusedLoraLinear) for module in names["model"].modules())


def rega(names: dict, out: str) -> None:
    assert len(names["rows"]) == names["counts"].total and names["answers"].shape[0] == 2


def generation(names: dict, out: str) -> None:
    """Each sequence gets what its adapter alone would write."""
    model, batch, width = names["model"], names["batch"], names["batch"]["input_ids"].shape[1]
    for row, adapter in enumerate(["law", "medicine"]):
        model.set_adapter(adapter)
        alone = model.generate(**{name: value[row : row + 1] for name, value in batch.items()}, max_new_tokens=8)
        written = names["answers"][row, width:]
        assert torch.equal(written[: alone.shape[1] - width], alone[0, width:])


def patched(names: dict, out: str) -> None:
    assert "LoRAMoE 8x4" in out


RESULTS = {
    "README.md": patched, "docs/index.md": patched, "docs/loramoe.md": loramoe, "docs/alora.md": alora,
    "docs/loki.md": loki, "docs/lora.md": lora, "docs/rega.md": rega, "docs/generation.md": generation,
}  # fmt: skip


class Parsed(Exception):
    pass


@pytest.mark.parametrize("document, command", COMMANDS)
def test_the_command_line_accepts(document, command, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *args) -> None:
        raise Parsed(parse(parser, *args))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        main(shlex.split(command))


@pytest.mark.parametrize("document, module", MODULES)
def test_modules_that_commands_name(document, module):
    assert importlib.util.find_spec(f"gci_kernels.{module}")


def test_the_commands_of_rega(folder):
    """As they stand, but for the model."""
    distill, mix = (shlex.split(command) for document, command in COMMANDS if document == "docs/rega.md")
    assert main([*distill, "--model", "model", "--device", "cpu", "--max-new-tokens", "4"]) == 0
    assert main(mix) == 0 and Path("mixture.jsonl").exists()


def test_the_commands_of_loki(folder):
    """As they stand, but for the model."""
    Path("general.jsonl").write_text('{"text": "the tenant shall pay"}\n{"text": "a court may find"}\n')
    attribute, select = (shlex.split(command) for document, command in COMMANDS if document == "docs/loki.md")
    assert main([*(part.replace("smollm2", "model") for part in attribute), "--device", "cpu"]) == 0
    assert main(select) == 0 and Path("positions.json").exists() and Path("chosen.png").exists()
