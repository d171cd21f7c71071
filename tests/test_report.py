"""report says what really runs, and never fails, whatever wraps the layers or stands in the place of their forward."""

import accelerate
import pytest
import torch
from peft import IA3Config, LoraConfig, XLoraConfig, get_peft_model
from torch import nn
from toy_adapters import METHODS, SIZES, config_of, llama
from toy_lora import adapted_layers, tiny_llama, with_lora, with_two_adapters
from transformers import MixtralConfig, MixtralForCausalLM

from gci_kernels import LoRAMoEConfig, patch, report
from gci_kernels.ops.bottleneck import choose_plan

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(model: nn.Module) -> dict:
    assert str(report(model))
    return {row.name.removeprefix("base_model.model."): row for row in report(model)}


@pytest.mark.parametrize("method", METHODS)
def test_forward_replaced_on_a_layer(method):
    model = patch(llama(), config_of(method))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.forward = lambda x: layer.base_layer(x)
    first, second = rows(model).values()
    assert first.plan is None and first.declined == "its forward is replaced on the instance"
    assert first.base == "own call: declined"
    assert second.plan is not None and second.declined is None


@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_a_layer(method):
    model = patch(llama(), config_of(method))
    model.base_model.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    first, second = rows(model).values()
    assert first.plan.endswith("(between hooks of the layer)") and "hooks" not in second.plan


def test_xlora(tmp_path):
    get_peft_model(llama(), config_of("lora")).save_pretrained(tmp_path)
    adapters = {"0": str(tmp_path), "1": str(tmp_path)}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, xlora_depth=1)
    model = get_peft_model(llama(use_cache=False), config)
    with pytest.raises(ValueError, match="nothing to patch.*replaced on the instance by that of XLoraLinearLayer"):
        patch(model)
    assert {row.declined for row in rows(model).values()} == {
        "its forward is replaced on the instance by that of XLoraLinearLayer"
    }


@pytest.mark.parametrize("method", METHODS)
def test_layers_within_a_module_that_is_saved_whole(method):
    model = patch(llama(), config_of(method))
    later = config_of(method)
    later.modules_to_save = ["mlp"]
    if method == "loki":
        later.positions = {"0.self_attn.q_proj": [1]}
    else:
        later.target_modules = {"q_proj"}
    model.add_adapter("later", later)
    name = "model.layers.0.mlp.{}.up_proj"
    for active, runs in (("later", "modules_to_save.later"), ("default", "original_module")):
        model.set_adapter(active)
        found = rows(model)
        for part in ("modules_to_save.later", "original_module"):
            declined = found[name.format(part)].declined or ""
            assert declined.startswith("it does not run") == (part != runs), (active, part, declined)


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_and_embeddings(tied):
    config = LoraConfig(
        r=4, target_modules=["q_proj", "embed_tokens"] if not tied else ["q_proj"],
        trainable_token_indices=[3] if tied else None, init_lora_weights=False,
    )  # fmt: skip
    found = rows(patch(llama(tie_word_embeddings=tied), config))
    assert found["model.layers.0.self_attn.q_proj"].plan
    others = {name: row for name, row in found.items() if "q_proj" not in name}
    assert others and all(row.plan is None and "has no fused form" in row.declined for row in others.values())
    if not tied:
        assert others["model.embed_tokens"].shape == "97 -> 32" and others["model.embed_tokens"].dtype == "float32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_are_parameters(dtype):
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**{**SIZES, "num_local_experts": 4})).to(dtype)
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    found = rows(patch(model, config))
    stacks = {row.method: row for row in found.values() if "q_proj" not in row.name}
    assert set(stacks) == {"LoRA r=4 of gate_up_proj", "LoRA r=4 of down_proj"}
    assert {row.dtype for row in stacks.values()} == {str(dtype).removeprefix("torch.")}
    assert stacks["LoRA r=4 of gate_up_proj"].shape == "4 x 32 -> 96"
    assert {row.declined for row in stacks.values()} == {"lora.layer.ParamWrapper has no fused form"}


def test_convolutions_and_other_methods():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    found = rows(patch(model, LoraConfig(r=2, target_modules=["0", "2"])))
    assert found["2"].plan and found["0"].declined == "lora.layer.Conv2d has no fused form"
    found = rows(get_peft_model(llama(), IA3Config(target_modules=["up_proj"], feedforward_modules=[])))
    assert {row.declined for row in found.values()} == {"ia3.layer.Linear has no fused form"}


@pytest.mark.parametrize("method", ["loramoe", "alora", "loki"])
def test_accelerate_hooks(method):
    model = accelerate.dispatch_model(patch(llama(), config_of(method)), {"": "cpu"}, force_hooks=True)
    assert all(row.declined is None for row in report(model))
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert all(row.declined is None for row in report(model))


def test_report_of_loramoe():
    model = patch(tiny_llama(torch.float32), LoRAMoEConfig(r=4, num_experts=8))
    rows = report(model)
    assert [row.name for row in rows] == list(adapted_layers(model))
    kinds = {(row.method, row.dtype, row.base, row.declined) for row in rows}
    assert kinds == {("LoRAMoE 8x4", "float32", "fused", None)}
    assert {row.name.rpartition(".")[2]: row.shape for row in rows} == {
        "gate_proj": "64 -> 96",
        "up_proj": "64 -> 96",
        "down_proj": "96 -> 64",
    }
    plan = str(choose_plan("auto", 2048, torch.float32, "cpu", "gate"))
    assert {row.plan for row in rows} == {plan}


def test_report_of_lora():
    model = with_two_adapters()
    assert {row.declined for row in report(model)} == {"not patched: call gci_kernels.patch(model)"}
    assert {row.plan for row in report(model)} == {None}
    rows = {row.name: row for row in report(patch(model))}
    assert rows.keys() == adapted_layers(model).keys()
    assert all((row.plan is None) != (row.declined is None) and row.dtype == "float64" for row in rows.values())
    assert {name.rpartition(".")[2]: row.method for name, row in rows.items()} == {
        "gate_proj": "LoRA r=4",
        "down_proj": "LoRA r=4",
        "q_proj": "LoRA r=4, r=3",
        "up_proj": "LoRA r=3",
    }


def test_report_says_why_the_base_layer_is_called():
    model = patch(with_lora())
    name, layer = next(iter(adapted_layers(model).items()))
    layer.base_layer.register_forward_hook(lambda *_: None)
    assert {row.name: row.base for row in report(model) if row.base != "fused"} == {name: "own call: it has hooks"}


def test_printed_report_has_one_row_for_equal_layers():
    model = with_two_adapters(use_dora=True)
    patch(model).base_model.set_adapter("other")
    printed = str(report(model))
    assert "layers.*.mlp.gate_proj x 2" in printed and "layers.*.self_attn.q_proj x 2" in printed
    assert "declined: adapter 'other' uses DoraLinearVariant" in printed
    assert "project=" in printed
    assert sum(" x 2" in line for line in printed.splitlines()) == 4


def test_report_of_a_model_without_adapters_is_empty():
    assert report(tiny_llama()) == []
