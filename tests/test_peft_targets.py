"""Which modules get an adapter, of what rank: the choices of peft.LoraConfig that our bottleneck configs have."""

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gci_kernels import ALoRAConfig, LoKIConfig, LoRAMoEConfig, patch
from gci_kernels.accuracy import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[5, 17, 80, 3, 41], [8, 2, 36, 62, 8]])
CONFIGS = {LoRAMoEConfig: {"r": 2, "num_experts": 2}, ALoRAConfig: {"r": 4, "num_heads": 2}}
EVERY = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
each_method = pytest.mark.parametrize("config_cls", CONFIGS)


def plain(family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    if family == "gpt2":
        sizes = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=2)
        return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).eval()
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)).eval()


def config(config_cls: type, **changes):
    return config_cls(**CONFIGS[config_cls] | {"init_weights": False} | changes)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted layers, by what their names in the model end with: layer.part.leaf."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name.partition("layers.")[2] or name.partition(".h.")[2]: module for name, module in found.items()}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


TARGETS = [
    ({"target_modules": ["q_proj", "up_proj"]}, {"q_proj", "up_proj"}, "01"),
    ({"target_modules": ("q_proj", "up_proj")}, {"q_proj", "up_proj"}, "01"),
    ({"target_modules": r".*\.1\.(mlp\.up|self_attn\.q)_proj"}, {"q_proj", "up_proj"}, "1"),
    ({"target_modules": "all-linear"}, EVERY, "01"),
    ({"target_modules": "all-linear", "exclude_modules": ["up_proj", "q_proj"]}, EVERY - {"up_proj", "q_proj"}, "01"),
    ({"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"}, EVERY - {"gate_proj", "up_proj", "down_proj"},
     "01"),
    ({"target_modules": ["q_proj"], "layers_to_transform": 0}, {"q_proj"}, "0"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, {"q_proj"}, "1"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}, {"q_proj"}, "1"),
    ({"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["up_proj"]}, {"q_proj"}, "01"),
]  # fmt: skip


@each_method
@pytest.mark.parametrize(("changes", "leaves", "numbers"), TARGETS, ids=[str(case[0]) for case in TARGETS])
def test_targets(config_cls, changes, leaves, numbers):
    found = layers(get_peft_model(plain(), config(config_cls, **changes)))
    assert {(name[0], name.rpartition(".")[2]) for name in found} == {(n, leaf) for n in numbers for leaf in leaves}


@each_method
def test_targets_of_conv1d(config_cls):
    chosen = config(config_cls, target_modules=["c_attn"], layers_to_transform=[1], layers_pattern="h")
    assert list(layers(get_peft_model(plain("gpt2"), chosen))) == ["1.attn.c_attn"]


@pytest.mark.smoke
@each_method
@pytest.mark.parametrize("changes", [{"layers_to_transform": [7]}, {"exclude_modules": ["q_proj"]}], ids=str)
def test_choices_that_leave_nothing_raise(config_cls, changes):
    with pytest.raises(ValueError, match="No modules were targeted|not found in the base model|were excluded"):
        get_peft_model(plain(), config(config_cls, target_modules=["q_proj"], **changes))


PATTERNS = {
    "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 6, "v_proj": 8},
    "alpha_pattern": {"q_proj": 5, "0.self_attn.v_proj": 64.0},
    "lora_alpha": 3,
}


@each_method
def test_ranks_and_alphas_are_those_that_lora_would_have(config_cls):
    """PEFT's own LoRA, asked the same, is the definition of what a pattern means."""
    r = CONFIGS[config_cls]["r"]
    expected = layers(get_peft_model(plain(), LoraConfig(r=r, **PATTERNS)))
    actual = layers(get_peft_model(plain(), config(config_cls, **PATTERNS)))
    assert actual.keys() == expected.keys()
    shapes = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in actual.items()}
    assert shapes == {name: (layer.r["default"], layer.scaling["default"]) for name, layer in expected.items()}
    assert shapes == {
        "0.self_attn.q_proj": (r, 5 / r), "1.self_attn.q_proj": (6, 5 / 6),
        "0.self_attn.v_proj": (8, 8.0), "1.self_attn.v_proj": (8, 3 / 8),
    }  # fmt: skip
    for name, layer in actual.items():
        A, wanted = getattr(layer, layer.adapter_layer_names[0])["default"], shapes[name][0]
        assert A.shape[0] == wanted * (2 if config_cls is LoRAMoEConfig else 1)


@each_method
def test_patterns_are_saved_with_the_adapter(config_cls, tmp_path):
    model = get_peft_model(plain(), config(config_cls, **PATTERNS)).eval()
    model.add_adapter("other", config(config_cls, target_modules=["q_proj"], rank_pattern={"q_proj": 10}))
    model.save_pretrained(tmp_path)
    saved = PeftConfig.from_pretrained(tmp_path)
    assert saved.rank_pattern == PATTERNS["rank_pattern"] and saved.alpha_pattern == PATTERNS["alpha_pattern"]
    assert (saved.r, saved.lora_alpha) == (CONFIGS[config_cls]["r"], 3), "the general ones stay what they are"
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(plain(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(logits(loaded), logits(model))
        loaded.load_adapter(tmp_path / "other", "other", low_cpu_mem_usage=low_cpu_mem_usage)
        assert {layer.r["other"] for layer in layers(loaded).values() if "other" in layer.r} == {10}


@each_method
def test_a_pattern_changes_what_is_computed_as_its_config_alone_would(config_cls):
    chosen = {"target_modules": ["q_proj", "v_proj"]}
    torch.manual_seed(1)
    expected = logits(get_peft_model(plain(), config(config_cls, r=6, lora_alpha=2, **chosen)).eval())
    for pattern in ("._proj", r"[qv]_proj"):
        torch.manual_seed(1)
        patterns = {"rank_pattern": {pattern: 6}, "alpha_pattern": {pattern: 2}}
        model = patch(plain(), config(config_cls, **chosen, **patterns)).eval()
        assert relative_error(logits(model), expected) < 1e-6
    assert relative_error(expected, logits(plain())) > 1e-3


BAD = [
    (LoRAMoEConfig, {"rank_pattern": ["q_proj"]}, TypeError, "rank_pattern must be a dict"),
    (LoRAMoEConfig, {"alpha_pattern": None}, TypeError, "alpha_pattern must be a dict"),
    (LoRAMoEConfig, {"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\] must be at least 1, got 0"),
    (LoRAMoEConfig, {"rank_pattern": {"q_proj": 2.0}}, TypeError, r"rank_pattern\['q_proj'\] must be an integer"),
    (ALoRAConfig, {"alpha_pattern": {"v": "2"}}, TypeError, r"alpha_pattern\['v'\] must be a number, got '2'"),
    (ALoRAConfig, {"alpha_pattern": {"v": float("nan")}}, ValueError, r"alpha_pattern\['v'\] must be a finite number"),
    (ALoRAConfig, {"rank_pattern": {"q_proj": 5}}, ValueError, "num_heads must divide r=5, got 2"),
    (ALoRAConfig, {"rank_pattern": {"q_proj": 258}}, ValueError, "r must be at most 256, got 258"),
]


@pytest.mark.parametrize(("config_cls", "changes", "error", "message"), BAD, ids=[case[3] for case in BAD])
def test_bad_patterns_are_named(config_cls, changes, error, message):
    with pytest.raises(error, match=message):
        config(config_cls, **changes)


@pytest.mark.parametrize("field", ("rank_pattern", "alpha_pattern"))
def test_patch_takes_a_pattern_that_matches_nothing_for_a_typing_error(field):
    model = plain()
    with pytest.raises(ValueError, match=f"{field}: no module matches 'q_porj'"):
        patch(model, config(LoRAMoEConfig, target_modules=["q_proj"], **{field: {"q_proj": 4, "q_porj": 4}}))
    assert not layers(model)


@pytest.mark.parametrize("field", ("rank_pattern", "alpha_pattern"))
def test_loki_has_positions_in_place_of_patterns(field):
    with pytest.raises(TypeError, match=field):
        LoKIConfig(positions=[[1], [2]], **{field: None})
