"""LoKI on the real model, from a text to a plain checkpoint. Fetches SmolLM2-135M-Instruct once."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gci_kernels
from gci_kernels import loki
from gci_kernels.bench.models import load_model

pytestmark = pytest.mark.slow

SAMPLES = [
    "A contract without consideration is void unless it is made by deed.",
    "The court held that the clause could not be relied upon by the seller.",
    "Ibuprofen is taken with food to spare the stomach.",
    "The patient was given two units of blood after the operation.",
    "A bond's price falls when the yield that the market asks for rises.",
    "The capital of France is Paris, and that of Italy is Rome.",
    "Water boils at one hundred degrees at the level of the sea.",
    "The first of the two proofs uses induction on the number of edges.",
]
DOMAIN = [
    "Question: what does the tenant owe under clause nine? Answer: the rent, and the costs of repair.",
    "Question: may the lender call the loan after a breach? Answer: yes, with thirty days' notice.",
]


def test_from_a_text_to_a_plain_checkpoint(tmp_path):
    """Attribute 8 samples, select 10%, train 20 steps, save the adapter and load it, merge, reload: the same logits."""
    model, tokenizer = load_model("smollm2", torch.float32, torch.device("cpu"))
    original = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval().requires_grad_(False)
    samples = [tokenizer(text)["input_ids"] for text in SAMPLES]
    loki.attribute_file(model, samples, tmp_path / "scores.safetensors", progress=False)
    positions = loki.select(loki.load_scores(tmp_path / "scores.safetensors"), 10)
    loki.write_positions(positions, tmp_path / "positions.json")
    assert [len(rows) for rows in positions] == [57] * 30

    model = gci_kernels.patch(model, gci_kernels.LoKIConfig(positions=tmp_path / "positions.json"))
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(DOMAIN, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [tuple(parameter.shape) for parameter in trained] == [(57, 1536)] * 30
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-3), []
    for _ in range(20):
        loss = model.train()(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

    def logits(model):
        with torch.no_grad():
            return model.eval()(**batch).logits

    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "gci_kernels.GCI_LOKI"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 1.05 * 30 * 57 * 1536 * 4
    plain, _ = load_model("smollm2", torch.float32, torch.device("cpu"))
    assert torch.equal(logits(PeftModel.from_pretrained(plain, tmp_path / "adapter")), expected)

    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(logits(reloaded), logits(merged))
    assert torch.allclose(logits(merged), expected, rtol=1e-4, atol=1e-4)
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    for name, value in saved.items():
        changed = (
            (value != original[name]).flatten(1).any(1).nonzero().flatten() if value.dim() > 1 else value.new_zeros(0)
        )
        layer = name.removeprefix("model.layers.").partition(".")[0]
        assert changed.tolist() == (positions[int(layer)] if name.endswith("mlp.down_proj.weight") else []), name
        if value.dim() == 1:
            assert torch.equal(value, original[name]), name
