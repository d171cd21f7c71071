"""Models that attend in both directions: ALoRA, whose attention is causal, says so; the other methods run."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from toy_decoders import IDS, SIZES, alora, made
from transformers import LlamaConfig, LlamaForCausalLM

import gci_kernels
from gci_kernels import LoKIConfig, LoRAMoEConfig
from gci_kernels.generation.direction import check_mask

pytestmark = pytest.mark.usefixtures("one_thread")

BERT = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


def not_causal() -> LlamaForCausalLM:
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


BOTH_WAYS = {
    "an encoder of BERT's kind": (lambda: made("BertLMHeadModel", **BERT), "query", "has is_decoder=False"),
    "an old encoder of that kind": (
        lambda: made("RoFormerForCausalLM", **BERT, embedding_size=32), "query", "has is_decoder=False",
    ),
    "a masked language model": (
        lambda: made("ModernBertForMaskedLM", **BERT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
                     sep_token_id=2), "Wqkv", "no causal language model of type 'modernbert'",
    ),
    "an encoder without a word of it": (
        lambda: made("MPNetForMaskedLM", **BERT, pad_token_id=1), "q", "no causal language model of type 'mpnet'",
    ),
    "the config": (lambda: llama(is_causal=False), "q_proj", "config has is_causal=False"),
    "the attention modules": (not_causal, "q_proj", "LlamaAttention has is_causal=False"),
    "Gemma as an encoder": (
        lambda: made("GemmaForCausalLM", **SIZES, use_bidirectional_attention=True), "q_proj",
        "use_bidirectional_attention=True",
    ),
    "XLNet": (
        lambda: made("XLNetLMHeadModel", vocab_size=61, d_model=32, n_layer=2, n_head=4, d_inner=40), "layer_1",
        "order of a permutation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOTH_WAYS)
def test_a_model_that_attends_in_both_directions_is_refused_and_left_alone(kind):
    make, target, why = BOTH_WAYS[kind]
    model = make()
    before = [(type(module), set(vars(module))) for module in model.modules()]
    with pytest.raises(ValueError, match=f"attends in both directions, for .*{why}.*use LoRA or LoRAMoE"):
        alora(model, target)
    assert [(type(module), set(vars(module))) for module in model.modules()] == before


@pytest.mark.parametrize("method", ["lora", "loramoe", "loki"])
@pytest.mark.parametrize("kind", BOTH_WAYS)
def test_the_other_methods_follow_it(kind, method):
    make, target, _ = BOTH_WAYS[kind]
    model = make()
    names = [name for name, module in model.named_modules() if name.endswith("." + target)]
    if method == "lora":
        patched = gci_kernels.patch(get_peft_model(model, LoraConfig(target_modules=names, init_lora_weights=False)))
    elif method == "loki":
        patched = gci_kernels.patch(model, LoKIConfig(positions={name: [0, 3] for name in names}, init_weights=False))
    else:
        config = LoRAMoEConfig(r=2, num_experts=2, target_modules=names, init_weights=False)
        patched = gci_kernels.patch(model, config)
    changed = IDS.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        first, second = (patched.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)) for ids in (IDS, changed))
    assert not torch.allclose(first.logits[:, 0], second.logits[:, 0])


def flip_config(model: nn.Module) -> None:
    model.config.is_causal = False


def flip_modules(model: nn.Module) -> None:
    for layer in model.get_base_model().model.layers:
        layer.self_attn.is_causal = False


@pytest.mark.parametrize("flip", [flip_config, flip_modules])
def test_a_model_that_is_changed_later_is_refused_too(flip):
    patched = alora(llama())
    patched(input_ids=IDS)
    flip(patched)
    with pytest.raises(ValueError, match="attends in both directions"):
        patched(input_ids=IDS)
    with patched.disable_adapter():
        assert patched(input_ids=IDS).logits.isfinite().all()


def test_a_forward_in_both_directions_is_refused():
    with pytest.raises(ValueError, match="^is_causal=False makes this forward attend in both directions"):
        alora(llama())(input_ids=IDS, is_causal=False)


# Masks


def gemma3() -> nn.Module:
    vision = dict(
        hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = transformers.Gemma3Config(
        text_config=dict(SIZES, layer_types=["sliding_attention", "full_attention"], sliding_window=6),
        vision_config=vision, mm_tokens_per_image=4, image_token_index=57, boi_token_index=58, eoi_token_index=59,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("training", [False, True])
def test_an_image_whose_tokens_see_each_other_is_refused_and_text_is_not(training):
    patched = alora(gemma3()).train(training)
    ids = IDS.index_fill(1, torch.arange(1, 5), 57)
    given = dict(input_ids=ids, pixel_values=torch.ones(2, 3, 16, 16), token_type_ids=(ids == 57).long())
    with pytest.raises(ValueError, match="^attention_mask lets tokens attend to later ones"):
        patched(**given)
    with patched.disable_adapter():
        assert patched(**given).logits.isfinite().all()
    assert patched(input_ids=IDS, token_type_ids=torch.zeros_like(IDS)).logits.isfinite().all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prefix_that_only_the_model_knows_of_is_refused(attention):
    """The backbone makes the mask itself, so that it is seen where it reaches the layers."""
    if not hasattr(transformers, "HrmTextForCausalLM"):
        pytest.skip("this transformers has no HrmText")
    model = made("HrmTextForCausalLM", **{**SIZES, "num_hidden_layers": 3}, H_cycles=1, L_cycles=2,
                 num_layers_per_stack=1, prefix_lm=True)  # fmt: skip
    model.set_attn_implementation(attention)
    patched, prefix = alora(model), torch.tensor([[1, 1, 1, 0, 0, 0, 0]] * 2)
    with pytest.raises(ValueError, match="^attention_mask lets tokens attend to later ones"):
        patched(input_ids=IDS, token_type_ids=prefix)
    for mask in (torch.ones_like(IDS), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]), None):
        assert patched(input_ids=IDS, attention_mask=mask).logits.isfinite().all()


CAUSAL = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
PREFIX = CAUSAL.index_fill(3, torch.arange(2), True)
LEFT = torch.tensor([[-1, -1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.int32)
WINDOW = CAUSAL.triu(-1)
MASKS = {
    "causal": (CAUSAL, None, False),
    "inverted": (~CAUSAL, None, False),
    "floating": (torch.zeros(CAUSAL.shape).masked_fill(~CAUSAL, torch.finfo(torch.float32).min), None, False),
    "infinite": (torch.zeros(CAUSAL.shape).masked_fill(~CAUSAL, -torch.inf), None, False),
    "old": (torch.zeros(CAUSAL.shape).masked_fill(~CAUSAL, -1e4), None, False),
    "biased": (torch.zeros(CAUSAL.shape).masked_fill(~CAUSAL, -1e4) - torch.arange(5.0), None, False),
    "window": (WINDOW, None, False),
    "static": (torch.nn.functional.pad(CAUSAL, (0, 3)), None, False),
    "padding sees all": (CAUSAL | (LEFT < 0)[:, None, :, None], LEFT, False),
    "padding as keys": (CAUSAL & (LEFT >= 0)[:, None, None], LEFT, False),
    "one row for all": (torch.ones(2, 1, 1, 5, dtype=torch.bool), None, False),
    "a matrix": (torch.ones(2, 5), None, False),
    "none": (None, None, False),
    "prefix": (PREFIX, None, True),
    "inverted prefix": (~PREFIX, None, True),
    "floating prefix": (torch.zeros(CAUSAL.shape).masked_fill(~PREFIX, torch.finfo(torch.float32).min), None, True),
    "prefix of a whole row": (PREFIX, LEFT, True),
    "both ways in a window": (WINDOW | WINDOW.mT, None, True),
    "all": (torch.ones_like(CAUSAL), None, True),
}


@pytest.mark.parametrize("kind", MASKS)
def test_what_a_mask_says(kind):
    mask, segments, ahead = MASKS[kind]
    if not ahead:
        return check_mask(mask, segments, 2, 5)
    with pytest.raises(ValueError, match="attend to later ones"):
        check_mask(mask, segments, 2, 5)


@pytest.mark.parametrize("kind", ["causal", "padding sees all", "prefix"])
def test_what_a_mask_says_in_a_compiled_graph(kind):
    torch.compiler.reset()
    mask, segments, ahead = MASKS[kind]

    def check(mask, segments):
        check_mask(mask, segments, 2, 5)
        return mask.sum()

    compiled = torch.compile(check, fullgraph=True, backend="aot_eager")
    if not ahead:
        assert compiled(mask, segments) == mask.sum()
        return
    with pytest.raises(RuntimeError, match="attend to later ones"):
        compiled(mask, segments)


def test_a_block_mask():
    from torch.nn.attention.flex_attention import create_block_mask

    causal = create_block_mask(lambda b, h, q, k: q >= k, 2, 1, 5, 5, device="cpu", BLOCK_SIZE=128)
    prefix = create_block_mask(lambda b, h, q, k: (q >= k) | (k < 2), 2, 1, 5, 5, device="cpu", BLOCK_SIZE=128)
    check_mask(causal, None, 2, 5)
    with pytest.raises(ValueError, match="attend to later ones"):
        check_mask(prefix, None, 2, 5)
