"""README's recipes, each run as it stands, on a tiny Llama; two processes are test_scale_out.py's."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gci_kernels.tuners import FusedLoraLinear

README = Path(__file__).parents[1] / "README.md"
RECIPES = README.read_text().split("\n## Recipes\n")[1].split("\n## ")[0]
BLOCKS = dict(re.findall(r"### (.+?)\n\n```python\n(.+?)```", RECIPES, flags=re.S))
WORDS = "the a tenant shall court may find clause void of law and rent is due".split()


def test_every_recipe_is_here():
    assert list(BLOCKS) == [
        "LoRAMoE with Trainer", "ALoRA with generate", "LoKI, from a text file to a merged checkpoint",
        "A LoRA that is there already",
    ]  # fmt: skip
    assert "accelerate launch --num_processes 2 --cpu examples/two_processes.py" in RECIPES


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A model and its tokenizer, saved, beside the texts that the recipes read; the working folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained("model")
    vocab = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained("model")
    lines = [" ".join(WORDS[(row + step) % len(WORDS)] for step in range(5 + row % 4)) for row in range(24)]
    for name in ("law.txt", "general.txt"):
        Path(name).write_text("\n".join(lines) + "\n")
    return "model"


def run(title, path):
    """The recipe's names when it is through."""
    names = {"path": path}
    exec(compile(BLOCKS[title], title, "exec"), names)
    return names


def test_loramoe_with_trainer(path):
    names = run("LoRAMoE with Trainer", path)
    losses = [entry["train_loss"] for entry in names["trainer"].state.log_history if "train_loss" in entry]
    assert losses and losses[0] < 3.2  # ln 32 = 3.47 where nothing is learned
    saved = load_file("loramoe-adapter/adapter_model.safetensors")
    assert saved and all("loramoe_" in name for name in saved)


def test_alora_with_generate(path, capsys):
    names = run("ALoRA with generate", path)
    assert names["answers"].shape[0] == 2 and names["answers"].shape[1] > 6
    assert "the tenant shall" in capsys.readouterr().out


def test_loki_to_a_merged_checkpoint(path):
    run("LoKI, from a text file to a merged checkpoint", path)
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (path, "tuned"))
    assert before.keys() == after.keys()
    changed = {name: (before[name] != after[name]).any(-1).sum().item() for name in before}
    assert {name: count for name, count in changed.items() if count} == {
        f"model.layers.{layer}.mlp.down_proj.weight": 3 for layer in (0, 1)
    }


def test_a_lora_that_is_there_already(path, capsys):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(path), config).save_pretrained("lora-adapter")
    names = run("A LoRA that is there already", path)
    assert "LoRA r=4" in capsys.readouterr().out
    first, second = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("lora-adapter", "lora-adapter-2"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert not any(isinstance(module, FusedLoraLinear) for module in names["model"].modules())
