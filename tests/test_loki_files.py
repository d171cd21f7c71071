"""LoKI's adapters saved and loaded, and files that do not fit or are damaged."""

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from toy_loki import IDS, adapted, config, logits, loki_layers, plain

from gci_kernels import LoKIConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.smoke
@pytest.mark.parametrize("r", (None, 2))
@pytest.mark.parametrize("low_cpu_mem_usage", (False, True))
def test_save_and_load(tmp_path, r, low_cpu_mem_usage):
    model = adapted(dtype=torch.float32, r=r)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    parts = {"loki_active_bias", "loki_positions", "loki_settings._extra_state"} | (
        {"loki_active"} if r is None else {"loki_A", "loki_lora_B"}
    )
    assert set(weights) == {f"{name}.{part}" for name in loki_layers(model) for part in parts}
    saved = PeftConfig.from_pretrained(tmp_path)
    assert type(saved) is LoKIConfig and saved.positions is None and saved.rows == model.peft_config["default"].rows

    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(
            plain(dtype=torch.float32), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=trainable
        )
        assert torch.equal(logits(loaded), logits(model))
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} == (
            {n for n, p in model.named_parameters() if p.requires_grad} if trainable else set()
        )


def test_a_config_that_was_used_finds_the_rows_of_another_model_again():
    settings = config()
    get_peft_model(plain(), settings)
    other = get_peft_model(plain("gpt2"), settings)
    assert [layer.loki_positions["default"].tolist() for layer in loki_layers(other).values()] == [
        [4, 17, 31],
        [0, 5, 6, 7, 29],
    ]


def change_file(folder, change):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def test_adapters_of_other_models_and_damaged_ones_are_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="adapter is of another model: here are no modules model.layers.2.mlp.down_proj"
    ):
        PeftModel.from_pretrained(plain(num_hidden_layers=2), tmp_path)
    with pytest.raises(
        ValueError, match="mlp.down_proj: the adapter's .* saved with out_features=32, here is out_features=16"
    ):
        PeftModel.from_pretrained(plain(hidden_size=16), tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(plain(intermediate_size=40), tmp_path)

    key = "base_model.model.model.layers.0.mlp.down_proj.loki_positions"
    change_file(tmp_path, lambda weights: weights[key].copy_(torch.tensor([3, 9, 3])))
    with pytest.raises(ValueError, match="positions must be distinct, got 3 more than once"):
        PeftModel.from_pretrained(plain(), tmp_path)
    change_file(tmp_path, lambda weights: weights.pop(key))
    with pytest.raises(
        ValueError, match="adapter 'default' does not fit: it lacks .*layers.0.mlp.down_proj.loki_positions"
    ):
        PeftModel.from_pretrained(plain(), tmp_path)
    model = get_peft_model(plain(), PeftConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="adapter 'default' has no positions"):
        model(input_ids=IDS)
