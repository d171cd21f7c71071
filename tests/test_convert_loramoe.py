"""Adapters of the published LoRAMoE to ours and back: the same logits, the same bits, and one error for every fault."""

import json
import os

import published_layers
import pytest
import torch
from peft import PeftModel
from published_layers import (
    PUBLISHED_CONFIG,
    TARGETS,
    TOLERANCE,
    cut,
    edit,
    flip,
    logits,
    published_weights,
    read,
    refused,
    same_bits,
    save_published,
    tiny_llama,
    with_experts,
)
from safetensors.torch import load_file, save_file

from gci_kernels import LoRAMoEConfig, patch
from gci_kernels.accuracy import relative_error
from gci_kernels.convert import convert, loramoe, recognise

pytestmark = pytest.mark.usefixtures("one_thread")


moe = published_layers.moe


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_loramoe_from_published(tmp_path, dtype):
    published = with_experts(tiny_llama(dtype))
    source = save_published(tmp_path / "published", published_weights(published))
    assert recognise(source) is loramoe.PUBLISHED
    done = convert(source, tmp_path / "ours", progress=False)
    assert done.modules == 6 and recognise(tmp_path / "ours") is loramoe.OURS
    base = tiny_llama(dtype)
    without = logits(base)
    model = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    expected = logits(published)
    assert relative_error(without, expected) > 0.1
    assert relative_error(logits(model), expected) < TOLERANCE[dtype]
    config = model.peft_config["default"]
    assert (config.r, config.num_experts, config.lora_alpha, config.lora_dropout) == (3, 4, 8.0, 0.05)
    assert (config.balance_weight, config.balance_delta, config.balance_include_padding) == (0.2, 0.1, True)
    assert config.target_modules == set(TARGETS) and config.task_type == "CAUSAL_LM" and config.top_k is None
    assert (tmp_path / "ours" / "tokenizer.json").is_file()


def test_more_than_ten_experts_keep_their_order(tmp_path):
    """By name, A10 stands before A2."""
    published = with_experts(tiny_llama(), r=1, count=12)
    source = save_published(tmp_path / "published", published_weights(published), r=1, lora_nums=12)
    convert(source, tmp_path / "ours", progress=False)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    assert relative_error(logits(model), logits(published)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_loramoe_to_published(tmp_path, dtype):
    model = patch(tiny_llama(dtype), LoRAMoEConfig(r=3, num_experts=4, lora_alpha=8, init_weights=False)).eval()
    model.save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "published", progress=False).notes == ()
    weights = torch.load(tmp_path / "published" / "adapter_model.bin", weights_only=True)
    assert all(tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
               for tensor in weights.values())  # fmt: skip
    published = with_experts(tiny_llama(dtype))
    assert weights.keys() == published_weights(published).keys()
    published.load_state_dict({k.removeprefix("base_model.model."): t for k, t in weights.items()}, strict=False)
    assert relative_error(logits(published), logits(model)) < TOLERANCE[dtype]
    config = read(tmp_path / "published" / "adapter_config.json")
    assert config.keys() == PUBLISHED_CONFIG.keys()
    assert (config["lora_nums"], config["target_modules"], config["peft_type"]) == (4, TARGETS, "LORA")


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_loramoe_round_trip_keeps_every_bit(tmp_path, dtype):
    weights = published_weights(with_experts(tiny_llama(dtype)))
    weights["base_model.model.model.layers.1.mlp.up_proj.lora_B2.weight"][3, 1] = torch.nan
    weights["base_model.model.lm_head.weight"] = tiny_llama(dtype).lm_head.weight.data * 2
    source = save_published(tmp_path / "published", weights, modules_to_save=["lm_head"])
    convert(source, tmp_path / "ours", progress=False)
    convert(tmp_path / "ours", tmp_path / "again", progress=False)
    same_bits(torch.load(tmp_path / "again" / "adapter_model.bin", weights_only=True), weights)
    assert read(tmp_path / "again" / "adapter_config.json") == PUBLISHED_CONFIG | {"modules_to_save": ["lm_head"]}
    convert(tmp_path / "again", tmp_path / "ours again", progress=False)
    name = "adapter_model.safetensors"
    same_bits(load_file(tmp_path / "ours again" / name), load_file(tmp_path / "ours" / name))
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    saved = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(saved, weights["base_model.model.lm_head.weight"].float())


def test_published_targets_are_ends_of_names_wherever_a_word_begins(tmp_path):
    published = with_experts(tiny_llama(), ["te_proj"])
    source = save_published(tmp_path / "published", published_weights(published), target_modules=["te_proj"])
    convert(source, tmp_path / "ours", progress=False)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    assert relative_error(logits(model), logits(published)) < 2e-6


def test_a_published_regular_expression_stays(tmp_path):
    published, pattern = with_experts(tiny_llama(), ["layers.1.mlp.up_proj"]), r"model\.layers\.1\.mlp\.up.*"
    source = save_published(tmp_path / "published", published_weights(published), target_modules=pattern)
    convert(source, tmp_path / "ours", progress=False)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    assert relative_error(logits(model), logits(published)) < 2e-6
    assert model.peft_config["default"].target_modules == pattern


@pytest.mark.parametrize(
    "choice",
    [dict(layers_to_transform=[1]), dict(exclude_modules=["layers.0.mlp.gate_proj"]), dict(target_modules=".*up_proj")],
    ids=str,
)
def test_what_published_targets_cannot_say_becomes_whole_names(tmp_path, choice):
    settings = dict(r=2, num_experts=2, target_modules=["gate_proj"], balance_weight=0.1) | choice
    model = patch(tiny_llama(), LoRAMoEConfig(**settings))
    names = sorted(name for name, module in model.base_model.model.named_modules() if hasattr(module, "loramoe_A"))
    model.save_pretrained(tmp_path / "ours")
    assert "padding" in convert(tmp_path / "ours", tmp_path / "published", progress=False).notes[0]
    assert read(tmp_path / "published" / "adapter_config.json")["target_modules"] == names
    convert(tmp_path / "published", tmp_path / "again", progress=False)
    assert set(read(tmp_path / "again" / "adapter_config.json")["target_modules"]) == set(names)


def test_balance_settings_that_were_never_given(moe, tmp_path):
    (moe / "adapter_config.json").write_text(json.dumps(PUBLISHED_CONFIG | {"blc_alpha": None, "blc_weight": None}))
    convert(moe, tmp_path / "ours", progress=False)
    found = read(tmp_path / "ours" / "adapter_config.json")
    assert found["balance_weight"] == found["balance_delta"] == 0


KEY = "base_model.model.model.layers.1.mlp.gate_proj."
MOE_CONFIG_FAULTS = [
    *((dict([(field, None)]), f"lacks {field}") for field in ("r", "lora_nums", "lora_alpha", "target_modules")),
    (dict(lora_nums="4"), "lora_nums must be a number"), (dict(lora_nums=4.5), "num_experts must be an integer"),
    (dict(r=0), "r must be at least 1"), (dict(lora_dropout=1.5), "lora_dropout must be in"),
    (dict(top_k=2), "has top_k, which the published LoRAMoE does not know"),
    (dict(bias="all"), "bias must be 'none'"), (dict(fan_in_fan_out=True), "fan_in_fan_out must be False"),
    (dict(target_modules=[3]), "target_modules must be a list"), (dict(target_modules=[]), "must be a list"),
    (dict(modules_to_save="lm_head"), "modules_to_save must be a list"),
    (dict(target_modules="(up"), "target_modules is no regular expression"),
    (dict(peft_type=["LORA"]), "which no registered method has"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), MOE_CONFIG_FAULTS, ids=lambda value: str(value)[:30])
def test_loramoe_config_errors(moe, tmp_path, change, reason):
    edit(moe / "adapter_config.json", **change)
    if "lora_nums" in change and change["lora_nums"] is None:
        reason = "an adapter of 'LORA' has no published format"
    refused(moe, tmp_path, "adapter_config.json", reason)


def _drop(name):
    return lambda weights: weights.pop(KEY + name)


def _put(name, tensor):
    return lambda weights: weights.update({KEY + name: tensor})


MOE_WEIGHT_FAULTS = [
    (_drop("lora_A3.weight"), "lacks model.layers.1.mlp.gate_proj.lora_A3.weight"),
    (_drop("lora_B0.weight"), "lacks .*lora_B0"), (_drop("lora_route.weight"), "lacks .*lora_route"),
    (_put("lora_A4.weight", torch.zeros(3, 16)), "holds .*lora_A4.weight: it does not fit r=3 and lora_nums=4"),
    (_put("lora_A1.weight", torch.zeros(2, 16)), r"has shape \[2, 16\], it must be \[3, 16\] to fit r=3 and"),
    (_put("lora_B1.weight", torch.zeros(24, 3, 1)), "lora_B1.weight has shape"),
    (_put("lora_route.weight", torch.zeros(5, 16)), r"lora_route.weight has shape \[5, 16\]"),
    (_put("lora_A0.weight", torch.tensor(1.0)), "lora_A0.weight has shape"),
    (_put("lora_A1.weight", torch.zeros(3, 16).double()), "lora_A1.weight is torch.float64"),
    (_put("lora_A01.weight", torch.zeros(3, 16)), "which is no part of this LoRAMoE adapter"),
    (_put("weight", torch.zeros(24, 16)), "which is no part of this LoRAMoE adapter"),
    (_put("lora_A1.weight", torch.zeros(3, 16, dtype=torch.int64)), "must be a dense tensor"),
    (_put("lora_A1.weight", torch.zeros(3, 16).to_sparse()), "must be a dense tensor"),
    (_put("lora_A1.weight", torch.zeros(1).expand(3, 16)), "and fewer values"),
    (_put("lora_A1.weight", "text"), "is no tensor, it is a str"),
    (lambda weights: weights.update({3: torch.zeros(1)}), "must hold tensors by name"),
    (lambda weights: weights.clear(), "holds no experts"),
    (lambda weights: [weights.pop(k) for k in list(weights) if k.startswith(KEY)], "lacks the experts of layer 1's"),
    (lambda weights: [weights.pop(k) for k in list(weights) if "up_proj" in k], "lacks the experts of up_proj"),
    (lambda weights: weights.update({k.replace("gate", "q"): t for k, t in list(weights.items())}),
     "holds experts of model.layers.0.mlp.q_proj, which adapter_config.json does not name"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), MOE_WEIGHT_FAULTS, ids=[reason for _, reason in MOE_WEIGHT_FAULTS])
def test_loramoe_weight_errors(moe, tmp_path, change, reason):
    weights = torch.load(moe / "adapter_model.bin", weights_only=True)
    change(weights)
    torch.save(weights, moe / "adapter_model.bin")
    refused(moe, tmp_path, "adapter_model.bin", reason)


def test_modules_to_save_errors(moe, tmp_path):
    edit(moe / "adapter_config.json", modules_to_save=["lm_head"])
    refused(moe, tmp_path, "adapter_model.bin", "lacks the weights of lm_head")
    edit(moe / "adapter_config.json", modules_to_save=["mlp"])
    weights = torch.load(moe / "adapter_model.bin", weights_only=True)
    torch.save(weights | {KEY + "weight": torch.zeros(24, 16)}, moe / "adapter_model.bin")
    refused(moe, tmp_path, "adapter_model.bin", "an adapted layer's own weight")


@pytest.mark.parametrize("damage", ("cut", "empty", "flipped", "gone", "text"))
def test_damaged_pickle(moe, tmp_path, damage):
    path = moe / "adapter_model.bin"
    if damage == "cut":
        cut(path)
    elif damage == "gone":
        path.unlink()
    elif damage == "flipped":
        # A bit of a tensor's values: only the checksum knows.
        path.write_bytes(path.read_bytes().replace(*_values(moe)))
    else:
        path.write_bytes(b"" if damage == "empty" else b"tensors")
    refused(moe, tmp_path, "adapter_model.bin", "damaged" if damage != "gone" else "damaged|does not exist")


def _values(moe):
    weights = torch.load(moe / "adapter_model.bin", weights_only=True)
    values = next(iter(weights.values())).numpy().tobytes()
    return values, bytes([values[0] ^ 1]) + values[1:]


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_pickle_is_run(moe, tmp_path):
    weights = torch.load(moe / "adapter_model.bin", weights_only=True)
    torch.save(weights | {KEY + "lora_A1.weight": Evil(tmp_path / "made")}, moe / "adapter_model.bin")
    refused(moe, tmp_path, "adapter_model.bin", "holds other things than tensors: .*mkdir")


def test_a_whole_model_is_no_published_adapter(moe, tmp_path):
    torch.save(tiny_llama(), moe / "adapter_model.bin")
    refused(moe, tmp_path, "adapter_model.bin", "holds other things than tensors: .*LlamaForCausalLM")


@pytest.fixture
def our_moe(moe, tmp_path):
    convert(moe, tmp_path / "ours", progress=False)
    return tmp_path / "ours"


OUR_CONFIG_FAULTS = [
    (dict(top_k=2), "top_k=2: the published LoRAMoE uses every expert"), (dict(r=None), "lacks r"),
    (dict(r=4), "not this"), (dict(num_experts=300), "num_experts must be"), (dict(later=1), "has later, which"),
    (dict(target_modules=[3]), "target_modules must be a list"), (dict(rank_pattern={"q_proj": 2}), "has one r"),
    (dict(alpha_pattern={"q_proj": 2}), "has one r and lora_alpha"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), OUR_CONFIG_FAULTS, ids=lambda value: str(value)[:20])
def test_our_loramoe_config_errors(our_moe, tmp_path, change, reason):
    edit(our_moe / "adapter_config.json", **change)
    file = "adapter_config.json"
    if change == dict(r=4):
        file, reason = (
            "adapter_model.safetensors",
            r"has shape \[12, 24\], it must be \[16, 24\] to fit r=4 and num_experts=4",
        )
    refused(our_moe, tmp_path, file, reason)


def test_every_expert_chosen_is_dense(our_moe, tmp_path):
    edit(our_moe / "adapter_config.json", top_k=4)
    convert(our_moe, tmp_path / "target", progress=False)


@pytest.mark.parametrize("fault", ("cut", "header", "missing", "unknown", "config"))
def test_our_loramoe_file_errors(our_moe, tmp_path, fault):
    path = our_moe / "adapter_model.safetensors"
    reason, file = "damaged", path.name
    if fault == "cut":
        cut(path)
    elif fault == "header":
        flip(path, 0.0001)
    elif fault == "config":
        (our_moe / "adapter_config.json").write_text("{")
        reason, file = "no JSON file", "adapter_config.json"
    else:
        weights = load_file(path)
        moved = weights.pop(KEY + "loramoe_lora_B")
        reason = "lacks model.layers.1.mlp.gate_proj.loramoe_lora_B"
        if fault == "unknown":
            weights[KEY + "loramoe_C"], reason = moved, "no part of this LoRAMoE adapter"
        save_file(weights, path)
    refused(our_moe, tmp_path, file, reason)
