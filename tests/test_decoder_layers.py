"""Decoder layers wherever a model has them, and every method on what is not a plain stack of one class."""

import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from toy_decoders import IDS, SIZES
from transformers import PreTrainedModel

import gci_kernels
from gci_kernels import ALoRAConfig, LoKIConfig, LoRAMoEConfig
from gci_kernels.loki.architecture import Architecture
from gci_kernels.models.decoder_layers import find
from gci_kernels.tuners import AdaptedLinear, ALoRALinear, LoKILinear

pytestmark = pytest.mark.usefixtures("one_thread")

BERT = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYERS = ["ZambaMambaDecoderLayer", "ZambaHybridLayer", "ZambaHybridLayer"]
# Class of the model: its config, the class of its backbone, those of its layers, and one layer that each of them has.
MODELS = {
    "BertLMHeadModel": (dict(BERT, is_decoder=True), "BertModel", ["BertLayer"] * 2, "attention.output.dense"),
    "HrmTextForCausalLM": (
        dict(SIZES, num_hidden_layers=3, H_cycles=1, L_cycles=2, num_layers_per_stack=1),
        "HrmTextModel", ["HrmTextDecoderLayer"] * 2, "o_proj",
    ),
    "Gemma3nForCausalLM": (
        dict(SIZES, num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"], sliding_window=6,
             laurel_rank=8, altup_num_inputs=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=61),
        "Gemma3nTextModel", ["Gemma3nTextDecoderLayer"] * 2, "o_proj",
    ),
    "JambaForCausalLM": (
        dict(SIZES, attn_layer_period=2, attn_layer_offset=1, num_experts=2, num_experts_per_tok=1, mamba_d_state=8,
             mamba_dt_rank=4, use_mamba_kernels=False),
        "JambaModel", ["JambaMambaDecoderLayer", "JambaAttentionDecoderLayer"], "q_proj",
    ),
    "Llama4ForCausalLM": (
        dict(SIZES, intermediate_size_mlp=40, num_local_experts=2, attention_chunk_size=6, interleave_moe_layer_step=1),
        "Llama4TextModel", ["Llama4TextDecoderLayer"] * 2, "o_proj",
    ),
    "MambaForCausalLM": (
        dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.2, pad_token_id=0,
             eos_token_id=None),
        "MambaModel", ["MambaBlock"] * 2, "in_proj",
    ),
    "ModernBertDecoderForCausalLM": (
        dict(SIZES, local_attention=6), "ModernBertDecoderModel", ["ModernBertDecoderLayer"] * 2, "q_proj",
    ),
    "MptForCausalLM": (
        dict(vocab_size=61, d_model=32, n_layers=2, n_heads=4, pad_token_id=0, eos_token_id=None),
        "MptModel", ["MptBlock"] * 2, "out_proj",
    ),
    "TrOCRForCausalLM": (
        dict(vocab_size=61, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=40, dropout=0.0,
             pad_token_id=0, eos_token_id=None),
        "TrOCRDecoder", ["TrOCRDecoderLayer"] * 2, "self_attn.out_proj",
    ),
    "ZambaForCausalLM": (
        dict(SIZES, num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "hybrid"], mamba_d_state=8,
             mamba_dt_rank=4, n_mamba_heads=2, use_mamba_kernels=False),
        "ZambaModel", LAYERS, "q_proj",
    ),
}  # fmt: skip
OWN = {
    "loramoe": lambda targets: LoRAMoEConfig(r=2, num_experts=2, target_modules=targets, init_weights=False),
    "alora": lambda targets: ALoRAConfig(r=4, num_heads=2, target_modules=targets, init_weights=False),
}


def made(name: str) -> PreTrainedModel:
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    return cls(cls.config_class(**MODELS[name][0])).eval()


def of_layers(model: nn.Module, target: str) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith("." + target)]


def adapted(model: PreTrainedModel, method: str, target: str) -> nn.Module:
    names = of_layers(model, target)
    if method == "lora":
        return gci_kernels.patch(get_peft_model(model, LoraConfig(target_modules=names, init_lora_weights=False)))
    if method == "loki":
        return gci_kernels.patch(model, LoKIConfig(positions={name: [0, 3] for name in names}, init_weights=False))
    return gci_kernels.patch(model, OWN[method](names))


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_of_a_model(name):
    backbone, layers = find(made(name))
    assert (type(backbone).__name__, [type(layer).__name__ for layer in layers]) == MODELS[name][1:3]


@pytest.mark.parametrize("method", ["lora", "loramoe", "alora", "loki"])
@pytest.mark.parametrize("name", MODELS)
def test_every_method_generates_with_a_cache_what_it_does_without(name, method):
    model = made(name)
    with torch.no_grad():
        before = model(input_ids=IDS, use_cache=False).logits
    patched = adapted(model, method, MODELS[name][3]).eval()
    options = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        assert not torch.allclose(patched(input_ids=IDS, use_cache=False).logits, before)
    assert torch.equal(patched.generate(**options), patched.generate(**options, use_cache=False))
    patched.train()(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in patched.parameters())
    if method != "lora":
        with torch.no_grad():
            assert torch.equal(gci_kernels.unpatch(patched).eval()(input_ids=IDS, use_cache=False).logits, before)


def test_a_layer_that_decoder_layers_share_keeps_each_run_apart():
    model = made("ZambaForCausalLM")
    model.model.layers[2].shared_transf = model.model.layers[1].shared_transf
    patched = adapted(model, "alora", "q_proj").eval()
    layer = model.model.layers[1].shared_transf.self_attn.q_proj
    assert layer.decoder_layers == (1, 2) and layer.key_in(1, 0) != layer.key_in(2, 0)
    options = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
    assert torch.equal(patched.generate(**options), patched.generate(**options, use_cache=False))


def test_lists_beside_the_layers():
    config = transformers.MusicgenDecoderConfig(
        vocab_size=61, hidden_size=32, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4, num_codebooks=2
    )
    model = transformers.MusicgenForCausalLM(config).eval()
    assert [type(layer).__name__ for layer in find(model)[1]] == ["MusicgenDecoderLayer"] * 2
    patched = gci_kernels.patch(model, OWN["alora"](["q_proj"]))  # of the cross-attention too, which is left out
    ids = IDS.repeat_interleave(2, 0)  # each row of the batch has a row for each codebook
    with torch.no_grad():
        logits = patched(input_ids=ids, use_cache=False).logits
        changed = ids.clone()
        changed[:, -1] += 1
        assert torch.equal(patched(input_ids=changed, use_cache=False).logits[:, :-1], logits[:, :-1])


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("XLMWithLMHeadModel", dict(vocab_size=61, emb_dim=32, n_layers=2, n_heads=4), "one ModuleList.*attentions"),
        ("T5ForConditionalGeneration", dict(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1), "encoder-decoder"),
    ],
)
def test_what_has_no_such_layers_is_refused(name, config, message):
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls(cls.config_class(**config))
    with pytest.raises(ValueError, match=message):
        find(model)


# Models with a vision tower


def vision_language(vision_layers: int = 2) -> PreTrainedModel:
    """A tower whose layers are named as the text model's, projections too."""
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(SIZES, rope_parameters=rope),
        vision_config=dict(
            depth=vision_layers, hidden_size=32, intermediate_size=40, num_heads=2, patch_size=4, spatial_merge_size=2,
            temporal_patch_size=1, out_hidden_size=32, window_size=16, fullatt_block_indexes=[1],
        ),
        image_token_id=5, video_token_id=6, vision_start_token_id=58, vision_end_token_id=59,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def with_image() -> dict:
    ids = torch.tensor([[9, 3, 58, 5, 5, 5, 5, 59, 11, 2]] * 2)
    pixels = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    return dict(
        input_ids=ids, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 4]] * 2), mm_token_type_ids=ids == 5
    )


def llava() -> PreTrainedModel:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**SIZES), image_token_index=57, image_seq_length=4
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("vision_layers", [2, 3])
def test_positions_of_loki_are_of_the_text_model(vision_layers):
    model = vision_language(vision_layers)
    assert len(find(model)[1]) == 2
    patched = gci_kernels.patch(model, LoKIConfig(positions=[[1, 5, 9], [0, 3]], init_weights=False))
    names = [name for name, module in patched.named_modules() if isinstance(module, LoKILinear)]
    assert len(names) == 2 and all("language_model.layers." in name for name in names)
    with torch.no_grad():
        assert patched(**with_image()).logits.isfinite().all()
    assert len(Architecture.of(vision_language(vision_layers)).layers) == 2


@pytest.mark.parametrize("mode", [dict(), dict(num_beams=2), dict(cache_implementation="static")], ids=str)
def test_alora_generates_with_an_image_what_it_would_without_a_cache(mode):
    patched = gci_kernels.patch(vision_language(), OWN["alora"](None)).eval()
    given = dict(with_image(), max_new_tokens=4, do_sample=False)
    without = {name: value for name, value in mode.items() if name != "cache_implementation"}
    assert torch.equal(patched.generate(**given, **mode), patched.generate(**given, **without, use_cache=False))
    given.pop("max_new_tokens"), given.pop("do_sample")
    patched.train()(**given, labels=given["input_ids"]).loss.backward()


def test_alora_leaves_out_a_vision_tower_and_says_so():
    with pytest.warns(UserWarning, match=r"leaves out 6 targeted layers .*vision_tower.*exclude_modules"):
        patched = gci_kernels.patch(llava(), OWN["alora"](None))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = OWN["alora"](None)
        config.exclude_modules = ".*vision_tower.*"
        excluded = gci_kernels.patch(llava(), config)
    for model in (patched, excluded):
        names = [name for name, module in model.named_modules() if isinstance(module, ALoRALinear)]
        assert len(names) == 8 and all("language_model" in name for name in names)
    excluded.load_state_dict(patched.state_dict())
    given = dict(input_ids=IDS.index_fill(1, torch.arange(1, 5), 57), pixel_values=torch.ones(2, 3, 8, 8))
    with torch.no_grad():
        assert torch.equal(patched(**given).logits, excluded(**given).logits)
    patched.train()(**given, labels=given["input_ids"]).loss.backward()
    assert all(p.grad is not None for name, p in patched.named_parameters() if "alora" in name)


def test_an_adapter_without_its_tower_is_saved_and_loaded(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patched = gci_kernels.patch(llava(), OWN["alora"](None)).eval()
        patched.save_pretrained(tmp_path)
        loaded = gci_kernels.patch(llava(), OWN["alora"](None)).eval()
        loaded.load_adapter(tmp_path, "default")
    assert sum(isinstance(module, AdaptedLinear) for module in loaded.modules()) == 8
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, patched(input_ids=IDS).logits)
