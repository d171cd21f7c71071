"""Adapter files: what does not fit the model or the config is refused by name, by PEFT's ways and transformers'."""

import json

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from toy_adapters import CONFIGS, IDS, adapted, each_method, each_of_ours, llama, logits, saver
from transformers import AutoModelForCausalLM

from gci_kernels import patch
from gci_kernels.accuracy import relative_error
from gci_kernels.tuners import ALoRALinear, LoRAMoELinear, methods

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]


@pytest.fixture
def folder(tmp_path):
    return saver(tmp_path)


def edit_config(path, **changes) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(path, change) -> None:
    weights = load_file(path / "adapter_model.safetensors")
    save_file(change(weights) or weights, path / "adapter_model.safetensors", metadata={"format": "pt"})


# peft_type


@each_of_ours
def test_the_type_is_as_peft_s_own(method):
    kind, theirs = CONFIGS[method]().peft_type, LoraConfig().peft_type
    assert kind.value == kind.name == f"GCI_{method.upper().rstrip('*')}" == kind and hash(kind) == hash(kind.value)
    assert isinstance(kind, str) and json.loads(json.dumps({"peft_type": kind})) == {"peft_type": kind.value}
    assert str(kind).partition(".")[2] == kind.value and str(theirs).partition(".")[2] == "LORA"
    assert kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING and kind.value in peft.PEFT_TYPE_TO_TUNER_MAPPING
    assert kind not in (peft.PeftType.LORA, peft.PeftType.PREFIX_TUNING) and kind != theirs
    model = adapted(method)
    assert model.get_model_status().peft_types == {"default": kind.value}
    with pytest.raises(ValueError, match=f"different peft types. Found .*{kind.value} and PeftType.LORA"):
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))


@each_method
def test_transformers_loads_switches_saves_and_deletes(method, folder, tmp_path):
    model, path = folder(method)
    other = adapted(method, **{"positions": [[2], [4, 7, 8]]} if "loki" in method else {"r": 6} | (
        {"num_heads": 3} if method == "alora" else {}))  # fmt: skip
    other.save_pretrained(tmp_path / "other")
    plain, wanted, second = logits(llama()), logits(model), logits(other)
    assert min(relative_error(wanted, plain), relative_error(second, wanted)) > 1e-3
    base = llama()
    for name, place in (("default", path), ("other", tmp_path / "other")):
        base.load_adapter(str(place), adapter_name=name)
    if method == "lora":
        patch(base)
    for name, value in (("default", wanted), ("other", second)):
        base.set_adapter(name)
        assert base.active_adapters() == [name] and relative_error(logits(base), value) < 1e-6
    base.disable_adapters()
    assert torch.equal(logits(base), plain)
    base.enable_adapters()
    base.save_pretrained(tmp_path / "again")
    assert relative_error(logits(PeftModel.from_pretrained(llama(), tmp_path / "again")), second) < 1e-6
    tokens = base.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, other.generate(input_ids=IDS, max_new_tokens=3, do_sample=False))
    base.delete_adapter("default")
    assert list(base.peft_config) == ["other"] and relative_error(logits(base), second) < 1e-6
    base.delete_adapter("other")
    assert torch.equal(logits(base), plain)


@each_method
@pytest.mark.parametrize("auto", (AutoModelForCausalLM, peft.AutoPeftModelForCausalLM, peft.AutoPeftModel))
def test_loaded_by_the_adapter_s_folder_alone(method, auto, folder):
    task = None if auto is peft.AutoPeftModel else "CAUSAL_LM"
    model, path = folder(method, task_type=task)
    assert relative_error(logits(auto.from_pretrained(str(path)).eval()), logits(model)) < 1e-6


@each_of_ours
def test_added_by_transformers_it_trains(method):
    model = llama()
    model.add_adapter(CONFIGS[method](**{"balance_weight": 0.1} if method == "loramoe" else {}))
    given = {"task_types": torch.tensor([0, 1])} if method == "loramoe" else {}
    model.train()(input_ids=IDS, labels=IDS, **given).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("default" in name for name in trained)


def test_all_layers_of_several_adapters_that_transformers_loaded_belong_together():
    model = llama()
    for name, target in (("one", "q_proj"), ("two", "v_proj")):
        model.add_adapter(CONFIGS["alora"](target_modules=[target]), name)
    layers = [module for module in model.modules() if isinstance(module, ALoRALinear)]
    model.set_adapter(["one", "two"])
    expected = {key for key, _ in model.model.gci_backbone.expected_entries()}
    assert {layer.key for layer in layers} == expected and len(layers) == 4
    model.delete_adapter("two")

    moe = llama()
    for name, target in (("one", "up_proj"), ("two", "down_proj")):
        moe.add_adapter(CONFIGS["loramoe"](target_modules=[target], balance_weight=0.1), name)
    moe.set_adapter(["one", "two"])
    assert len({id(module.collector) for module in moe.modules() if isinstance(module, LoRAMoELinear)}) == 1
    both = moe.train()(input_ids=IDS, labels=IDS, task_types=torch.tensor([0, 1])).balance_loss
    moe.set_adapter("one")
    assert both > moe(input_ids=IDS, labels=IDS, task_types=torch.tensor([0, 1])).balance_loss > 0


@each_of_ours
def test_a_process_that_has_not_imported_us_says_whom_to_import(method, folder, monkeypatch):
    _, path = folder(method)
    config = CONFIGS[method]()
    said = methods.type_in_file(type(config))
    for key in (config.peft_type, said):
        monkeypatch.delitem(peft.PEFT_TYPE_TO_CONFIG_MAPPING, key)
    with pytest.raises(KeyError, match="import the module that registers it" if method == "hydralora" else f"'{said}'"):
        PeftModel.from_pretrained(llama(), path)


# What does not fit


def refused(path, message: str, model: nn.Module | None = None) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        PeftModel.from_pretrained(llama() if model is None else model, path)


CHANGED = [
    ("alora", dict(num_heads=1), "saved with num_heads=2, here is num_heads=1"),
    ("alora", dict(residual=True), "saved with residual=0, here is residual=1"),
    ("alora", dict(lora_alpha=8), "saved with lora_alpha=32, here is lora_alpha=8"),
    ("alora", dict(alpha_pattern={"layers.1.self_attn.v_proj": 7}), "layers.1.self_attn.v_proj: .* is lora_alpha=7"),
    ("loramoe", dict(top_k=1), "saved with top_k=0, here is top_k=1"),
    ("loramoe", dict(lora_alpha=31), "lora_alpha"),
    ("loramoe", dict(r=4), "saved with r=2, here is r=4|size mismatch"),
    ("loramoe", dict(r=4, num_experts=2), "saved with r=2, num_experts=4, here is r=4, num_experts=2"),
    ("loki*", dict(lora_alpha=16), "saved with lora_alpha=32, here is lora_alpha=16"),
    ("loki*", dict(r=3), "size mismatch.*loki_A"),
    ("loki", dict(r=2), "lacks .*loki_A"),
]


@pytest.mark.parametrize(("method", "changes", "message"), CHANGED, ids=str)
def test_a_config_that_was_changed_is_refused(method, changes, message, folder):
    _, path = folder(method)
    edit_config(path, **changes)
    refused(path, f"(?s){message}")
    # transformers puts tensors in one by one; what has another shape or no place it reports itself.
    if "saved with" in message and "r=" not in message:
        with pytest.raises(ValueError, match=message):
            llama().load_adapter(str(path))


@each_of_ours
def test_a_config_given_beside_the_file_is_compared_too(method, folder):
    _, path = folder(method)
    config = PeftConfig.from_pretrained(path)
    name = {"alora": "num_heads", "loramoe": "top_k", "loki*": "lora_alpha"}.get(method)
    if name is not None:
        setattr(config, name, 1)
        with pytest.raises(ValueError, match=f"{name}="):
            PeftModel.from_pretrained(llama(), path, config=config)
    other = get_peft_model(llama(), PeftConfig.from_pretrained(path))
    set_peft_model_state_dict(other, load_file(path / "adapter_model.safetensors"))
    assert torch.equal(logits(other.eval()), logits(PeftModel.from_pretrained(llama(), path)))


@each_of_ours
def test_another_model_is_refused(method, folder):
    _, path = folder(method)
    refused(path, "size mismatch|saved with out_features=32, here is out_features=64", llama(hidden_size=64))
    refused(path, "of 2 decoder layers, here are 3|lacks .*layers.2", llama(num_hidden_layers=3))
    refused(
        path, "here are no modules model.layers.1|for no place in this model, .*layers.1", llama(num_hidden_layers=1)
    )
    refused(path, "of another model", llama().model)


@each_of_ours
@pytest.mark.parametrize("binary", (False, True), ids=("safetensors", "bin"))
def test_files_that_lack_tensors_or_have_more_are_refused(method, binary, folder):
    model, path = folder(method)
    whole = load_file(path / "adapter_model.safetensors")
    parts = sorted(key for key in whole if not key.endswith("_extra_state"))

    def write(weights) -> None:
        (path / "adapter_model.safetensors").unlink(missing_ok=True)
        torch.save(weights, path / "adapter_model.bin") if binary else save_file(
            weights, path / "adapter_model.safetensors"
        )

    for key in parts[:: len(parts) // 3]:
        write({name: value for name, value in whole.items() if name != key})
        refused(path, f"adapter 'default' does not fit: it lacks {key}.default")
    beside = {parts[0].replace("layers.0", "layers.7"): whole[parts[0]].clone(), "of_nobody": torch.zeros(1)}
    write(whole | beside)
    refused(path, f"has, for no place in this model, {', '.join(sorted(beside))}. Is it")
    write(whole)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), path)), logits(model))


@each_of_ours
def test_modules_to_save_and_embeddings_have_their_place(method, folder, tmp_path):
    model, path = folder(method, modules_to_save=["lm_head"])
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), path)), logits(model))
    model.save_pretrained(tmp_path / "embeddings", save_embedding_layers=True)
    assert any("embed_tokens" in key for key in load_file(tmp_path / "embeddings" / "adapter_model.safetensors"))
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "embeddings")), logits(model))


@each_of_ours
@pytest.mark.parametrize("way", ("half", "low_cpu_mem_usage", "renamed"))
def test_what_fits_is_loaded(method, way, folder):
    model, path = folder(method)
    if way == "half":  # some tools cast whole files
        edit_weights(path, lambda w: {k: v.bfloat16() if v.is_floating_point() else v for k, v in w.items()})
    name = "other" if way == "renamed" else "default"
    loaded = PeftModel.from_pretrained(llama(), path, adapter_name=name, low_cpu_mem_usage=way == "low_cpu_mem_usage")
    assert relative_error(logits(loaded), logits(model)) < (2e-2 if way == "half" else 1e-7)


# Adapters that earlier versions saved


def as_before(path) -> None:
    """Turns a folder into what version 0.1 saved."""
    kind = json.loads((path / "adapter_config.json").read_text())["peft_type"]
    edit_config(path, peft_type=kind.removeprefix("gci_kernels.").partition(":")[0])
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    config.pop("num_layers", None)
    file.write_text(json.dumps(config))
    former = {"loramoe_lora_B": "loramoe_B", "loki_lora_B": "loki_B"}

    def rename(weights):
        kept = {key: value for key, value in weights.items() if not key.endswith("_extra_state")}
        return {
            key.rpartition(".")[0] + "." + former.get(key.rpartition(".")[2], key.rpartition(".")[2]): value
            for key, value in kept.items()
        }

    edit_weights(path, rename)


@each_of_ours
@pytest.mark.parametrize("low_cpu_mem_usage", (False, True))
@pytest.mark.filterwarnings("error:.*missing adapter keys")
def test_adapters_saved_before_are_loaded(method, low_cpu_mem_usage, folder):
    model, path = folder(method)
    as_before(path)
    edit_config(path, modules_to_save=["of_nobody"])  # which nobody checked
    if "loki" not in method:
        edit_config(path, layers_pattern="layers")
    assert not any("lora_B" in key and "alora" not in key for key in load_file(path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(llama(), path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))


@each_of_ours
def test_transformers_loads_them_or_says_what_to_do(method, folder, tmp_path):
    model, path = folder(method)
    as_before(path)
    if method in ("alora", "hydralora", "loki"):  # whose tensors have kept their names
        base = llama()
        base.load_adapter(str(path))
        assert torch.equal(logits(base), logits(model))
        return
    with pytest.raises(
        ValueError, match="saved by an earlier gci_kernels.*PeftModel.from_pretrained and save it again"
    ):
        llama().load_adapter(str(path))
    PeftModel.from_pretrained(llama(), path).save_pretrained(tmp_path / "again")
    base = llama()
    base.load_adapter(str(tmp_path / "again"))
    assert torch.equal(logits(base), logits(model))


@each_of_ours
def test_a_whole_model_s_state_from_before_is_loaded(method):
    model, twin = adapted(method), adapted(method)
    state = {
        key.replace("loramoe_lora_B", "loramoe_B").replace("loki_lora_B", "loki_B"): value.clone()
        for key, value in model.state_dict().items()
        if not key.endswith("_extra_state")
    }
    for name, parameter in twin.named_parameters():
        if "default" in name:
            parameter.data.zero_()
    twin.load_state_dict(state, strict=True)
    assert torch.equal(logits(twin), logits(model))
