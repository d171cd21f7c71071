"""Caches that a forward is given: under any argument, of any kind, beside which ALoRA keeps its own or says why not."""

import pytest
import torch
from torch import nn
from toy_decoders import IDS, SIZES, alora, made
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, LlamaForCausalLM
from transformers.generation.continuous_batching.cache import PagedAttentionCache

import gci_kernels
from gci_kernels import LoKIConfig, LoRAMoEConfig
from gci_kernels.generation.forward_context import read

pytestmark = pytest.mark.usefixtures("one_thread")

GIVEN = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)


def llama(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": layers})).eval()


class _StateOfMyOwn:
    def get_seq_length(self) -> int:
        return 3


def paged() -> PagedAttentionCache:
    return PagedAttentionCache.__new__(PagedAttentionCache)


UNKNOWN = {
    "cache": (paged, "cache is a PagedAttentionCache; adapters can keep theirs beside DynamicCache and StaticCache"),
    "past_key_values": (paged, "past_key_values must be a transformers Cache, got PagedAttentionCache"),
    "past_key_value": (paged, "past_key_value is a PagedAttentionCache"),
    "anything": (_StateOfMyOwn, "anything is a _StateOfMyOwn"),
    "block_table": (lambda: torch.zeros(1, 2, 4, dtype=torch.int32), "block_table is a Tensor"),
    "state": (lambda: [torch.zeros(2, 4)], "state is a list"),
    "cache_params": (_StateOfMyOwn, "cache_params is a _StateOfMyOwn"),
}


@pytest.mark.parametrize("argument", UNKNOWN)
def test_a_cache_that_is_not_known_is_refused_before_anything_runs(argument):
    make, message = UNKNOWN[argument]
    patched, ran = alora(llama()), []
    handle = patched.get_base_model().model.embed_tokens.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(TypeError, match=message):
        patched(input_ids=IDS, **{argument: make()})
    handle.remove()
    assert not ran
    assert patched(input_ids=IDS).logits.isfinite().all()


def test_what_is_no_cache_is_not_taken_for_one():
    given = dict(input_ids=IDS, use_cache=True, cache_position=torch.arange(7), labels=IDS, state=None, cache=False)
    assert read(given, None).sequence.past == 0


def test_continuous_batching_is_refused_where_it_starts_and_runs_without_the_adapter():
    patched = alora(llama())
    with pytest.raises(TypeError, match=r"continuous batching \(generate_batch\).*PagedAttentionCache.*use generate"):
        patched.generate_batch(inputs=[[5, 17, 52]])
    with patched.disable_adapter():
        assert patched.init_continuous_batching() is not None
    for config in (LoRAMoEConfig(r=2, num_experts=2), LoKIConfig(positions=[[0], [1]])):
        assert gci_kernels.patch(llama(), config).init_continuous_batching() is not None
    assert not hasattr(type(gci_kernels.unpatch(patched)), "_gci_parts")


def test_a_state_that_is_no_cache_of_transformers_is_refused_in_generation_and_training_works():
    patched = alora(
        made("RwkvForCausalLM", vocab_size=61, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2), "key"
    )
    with pytest.raises(TypeError, match="state is a list"):
        patched.generate(**GIVEN)
    assert patched.generate(**GIVEN, use_cache=False).shape == (2, 12)
    patched.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in patched.parameters() if p.requires_grad)


MAMBA = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.2, pad_token_id=0,
             eos_token_id=None)  # fmt: skip


@pytest.mark.parametrize("mode", [dict(), dict(num_beams=2), dict(use_cache=False)], ids=str)
def test_a_cache_without_a_length_is_counted(mode):
    patched = alora(made("MambaForCausalLM", **MAMBA), "in_proj")
    actual = patched.generate(**GIVEN, **mode)
    assert torch.equal(actual, patched.generate(**GIVEN, **{**mode, "use_cache": False}))


def test_a_cache_without_a_length_that_was_filled_by_another_model_is_refused():
    model = made("MambaForCausalLM", **MAMBA)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=IDS, cache_params=cache)
        patched = alora(model, "in_proj")
        with pytest.raises(ValueError, match="past_key_values holds a state that was made before the adapter"):
            patched(input_ids=IDS[:, :1], cache_params=cache)
        with patched.disable_adapter():
            fresh = DynamicCache(config=model.config)
            patched(input_ids=IDS, cache_params=fresh)
        with pytest.raises(ValueError, match="holds 7 tokens, but 0 tokens of adapter"):
            patched(input_ids=IDS[:, :1], cache_params=fresh)


def test_a_decoders_cache_beside_that_of_its_cross_attention():
    patched = alora(
        made("TrOCRForCausalLM", vocab_size=61, d_model=32, decoder_layers=2, decoder_attention_heads=4,
             decoder_ffn_dim=40, dropout=0.0, pad_token_id=0, eos_token_id=None), "self_attn.q_proj",
    )  # fmt: skip
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        whole = patched(input_ids=IDS, use_cache=False).logits
        patched(input_ids=IDS[:, :4], past_key_values=cache)
        rest = patched(input_ids=IDS[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("exit_layer", [1, 2])
def test_an_assistant_that_exits_early(exit_layer):
    patched = alora(llama(3))
    given = {name: value[1:] if isinstance(value, torch.Tensor) else value for name, value in GIVEN.items()}
    expected = patched.generate(**given, use_cache=False)
    assert torch.equal(patched.generate(**given, assistant_early_exit=exit_layer), expected)
    assert torch.equal(patched.generate(**given), expected)


@pytest.mark.parametrize("axes", [3, 4])
def test_positions_with_axes(axes):
    """Three say where in an image a token is, and nothing of sequences; where there is a fourth, it comes first."""
    positions = torch.arange(7).expand(axes, 2, 7).clone()
    positions[0, :, 3:] -= 3  # two sequences in a row
    segments = read(dict(input_ids=IDS, position_ids=positions), None).sequence.segments
    assert segments is None if axes == 3 else torch.equal(segments, torch.tensor([[0] * 3 + [1] * 4] * 2))


def test_a_compiled_step_on_a_growing_cache():
    torch.compiler.reset()
    patched = alora(llama(1))
    compiled = torch.compile(patched.get_base_model(), backend="eager")
    cache = DynamicCache(config=patched.config)
    with torch.no_grad():
        whole = patched(input_ids=IDS, use_cache=False).logits
        patched(input_ids=IDS[:, :6], past_key_values=cache)
        step = compiled(input_ids=IDS[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(step, whole[:, 6:], atol=1e-5, rtol=1e-5)
