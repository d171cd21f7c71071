"""What a sequence is, captured from whole tiny models: padded and packed batches equal separate runs."""

import copy
import threading

import pytest
import torch
import toy_alora
from torch import nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

from gci_kernels import ALoRAConfig, patch
from gci_kernels.accuracy import relative_error
from gci_kernels.generation import sequence
from gci_kernels.generation.forward_context import read
from gci_kernels.generation.sequence import current, required

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES, IDS, LEFT, tolerance = toy_alora.FAMILIES, toy_alora.IDS, toy_alora.LEFT, toy_alora.tolerance
attached, plain, toys = toy_alora.attached, toy_alora.plain, toy_alora.toys
logits, positions = toy_alora.logits, toy_alora.positions

BATCHES = {"left": (IDS, LEFT), "right": (IDS.flip(1), LEFT.flip(1))}


def nothing_is_set() -> bool:
    return current() is None and sequence._thread.state.forward_context is None


# What is captured


def test_nothing_is_current_outside_of_a_forward():
    assert current() is None
    with pytest.raises(RuntimeError, match="sequence.attach"):
        required()


@pytest.mark.parametrize("side", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_equals_single_runs(family, side):
    model, (ids, mask) = attached(family), BATCHES[side]
    batch = logits(model, ids, mask)
    assert relative_error(logits(plain(family), ids, mask)[mask.bool()], batch[mask.bool()]) > 1e-3
    for row in range(len(ids)):
        real = mask[row].bool()
        assert relative_error(batch[row, real], logits(model, ids[row, real][None], None)[0]) < tolerance(family)
    assert nothing_is_set()


@pytest.mark.smoke
@pytest.mark.parametrize("lengths", [(3, 4), (1, 5, 1), (7,)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "gpt2"])
def test_packed_row_equals_separate_runs(family, lengths):
    model, ids = attached(family), IDS[:1]
    restarting = torch.cat([torch.arange(length) for length in lengths])[None]
    edges = torch.tensor([0, *lengths]).cumsum(0)
    alone = torch.cat([logits(model, part, None) for part in ids.split(lengths, 1)], 1)
    for kwargs in ({}, {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 7, "max_length_k": 7}):
        packed = logits(model, ids, None, position_ids=restarting, **kwargs)
        assert relative_error(packed, alone) < tolerance(family)


def test_positions_of_one_row_for_a_whole_batch():
    model = attached()
    restarting = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    batch = logits(model, IDS, None, position_ids=restarting)
    assert relative_error(batch, logits(model, IDS, None, position_ids=restarting.expand(3, -1))) < 1e-12


def test_backbone_by_itself_and_arguments_by_position():
    model = attached()
    with torch.no_grad():
        expected = model.model(input_ids=IDS, attention_mask=LEFT, use_cache=False).last_hidden_state
        actual = model.model(IDS, LEFT, use_cache=False).last_hidden_state
        embedded = model.model(inputs_embeds=model.model.embed_tokens(IDS), attention_mask=LEFT).last_hidden_state
    assert torch.equal(actual, expected)
    assert relative_error(embedded, expected) < 1e-12


def test_mask_may_be_longer_than_the_keys_there_are():
    model = attached()
    seen = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append(current().sequence))
    causal = torch.ones(7, 7, dtype=torch.bool).tril() & LEFT.bool()[:, None]
    longer = torch.zeros(3, 1, 7, 11, dtype=torch.bool)
    longer[:, 0, :, :7] = causal
    context = read({"input_ids": IDS, "attention_mask": longer}, None)
    logits(model)
    assert torch.equal(context.sequence.segments, seen[0].segments)
    wide = read({"input_ids": IDS, "attention_mask": torch.nn.functional.pad(LEFT, (0, 4))}, None)
    assert torch.equal(wide.sequence.segments, seen[0].segments)
    assert torch.equal(seen[0].segments, LEFT.int() - 1)


@pytest.mark.parametrize("floating", [False, True])
def test_4d_mask_that_is_causal_with_padding(floating):
    model = attached()
    mask = (torch.ones(7, 7, dtype=torch.bool).tril() & LEFT.bool()[:, None])[:, None]
    if floating:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    actual = logits(model, IDS, None, attention_mask=mask, position_ids=positions(LEFT))
    assert relative_error(actual[LEFT.bool()], logits(model)[LEFT.bool()]) < 1e-10


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_masks_the_one_without_a_window_counts(order):
    full = torch.ones(1, 5, dtype=torch.bool).tril(4)[None, None]
    window = full & torch.ones(1, 5, dtype=torch.bool).triu(2)
    masks = dict([("full_attention", full), ("sliding_attention", window)][::order])
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2), 0)
    context = read({"input_ids": IDS[:1, :1], "attention_mask": masks, "past_key_values": cache}, None)
    assert context.sequence.segments is None and context.sequence.past == 4


CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril().expand(3, 1, 7, 7)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"attention_mask": torch.ones_like(CAUSAL)},
        {"attention_mask": CAUSAL & torch.ones(7, 7, dtype=torch.bool).triu(-2)},
        {"attention_mask": torch.zeros(3, 1, 7, 7, dtype=torch.float64).masked_fill(~CAUSAL, -3.0)},
        {"attention_mask": CAUSAL.expand(3, 2, 7, 7)},
        {"attention_mask": CAUSAL[:, 0]},
        {"attention_mask": LEFT[:, 1:]},
        {"attention_mask": LEFT[:2]},
        {"attention_mask": {"sliding_attention": CAUSAL}},
        {"attention_mask": 2 * LEFT},
        {"position_ids": torch.arange(6).expand(3, 6)},
        {"cu_seq_lens_q": torch.tensor([0, 3, 7])},
        {"past_key_values": ((torch.ones(3), torch.ones(3)),)},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_what_cannot_be_captured_is_refused_and_named(kwargs):
    model = attached()
    with pytest.raises((ValueError, TypeError), match=f"^{next(iter(kwargs))}"):
        logits(model, IDS, None, **kwargs)
    assert nothing_is_set()
    assert logits(model).isfinite().all()


# Backward


def gradients(model: nn.Module, **kwargs) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    output = model(input_ids=IDS, attention_mask=LEFT, position_ids=positions(LEFT), **kwargs).logits[LEFT.bool()]
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family, reentrant):
    model = attached(family)
    expected = gradients(model, use_cache=False)
    calls = toys(model)[0].calls
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for use_cache in (False, True):
        actual = gradients(model, use_cache=use_cache)
        assert actual.keys() == expected.keys() and any(".qkv" in name for name in actual)
        errors = {name: relative_error(actual[name], expected[name]) for name in expected}
        assert max(errors.values()) < tolerance(family), errors
        assert nothing_is_set()
    assert toys(model)[0].calls == 5 * calls, "nothing was replayed"


def test_checkpointed_batches_whose_backward_comes_later():
    model = attached().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    alone = []
    for ids, mask in BATCHES.values():
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask).logits[mask.bool()].square().sum().backward()
        alone.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    losses = [model(input_ids=i, attention_mask=m).logits[m.bool()].square().sum() for i, m in BATCHES.values()]
    sum(losses).backward()
    for name, first in alone[0].items():
        assert relative_error(model.get_parameter(name).grad, first + alone[1][name]) < 1e-12


def test_layer_outside_of_its_model_raises():
    model = attached().train()
    layer = model.model.layers[0]
    with pytest.raises(RuntimeError, match="inside of that model's forward"):
        rotary = model.model.rotary_emb(torch.ones(1, 3, 32, dtype=torch.float64), torch.arange(3)[None])
        layer(torch.ones(1, 3, 32, dtype=torch.float64), position_embeddings=rotary)


# Exceptions, nesting, threads, modes


@pytest.mark.parametrize("where", ["model.layers.0.mlp", "model.layers.1", "model.norm"])
def test_exception_leaves_nothing_behind(where):
    model = attached()
    expected = logits(model)

    def stop(module, args):
        raise KeyError("stop")

    handle = model.get_submodule(where).register_forward_pre_hook(stop)
    with pytest.raises(KeyError, match="stop"):
        logits(model)
    assert nothing_is_set()
    handle.remove()
    assert torch.equal(logits(model), expected)


def test_model_run_inside_of_another_ones_layer():
    outer, inner = attached("llama"), attached("phi", seed=1)
    expected, expected_inner = logits(outer), logits(inner, *BATCHES["right"])
    seen = []

    def run_inner(module, args):
        before = current()
        seen.append(logits(inner, *BATCHES["right"]))
        assert current() is before

    outer.model.layers[0].self_attn.q_proj.register_forward_pre_hook(run_inner)
    assert torch.equal(logits(outer), expected)
    assert len(seen) == 1 and torch.equal(seen[0], expected_inner)


def test_threads_do_not_mix():
    model = attached()
    meet = threading.Barrier(2, timeout=20)
    expected = {side: logits(model, *batch) for side, batch in BATCHES.items()}
    actual = {}
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: (meet.wait(), None)[1])
    threads = [
        threading.Thread(target=lambda side=side: actual.update({side: logits(model, *BATCHES[side])}))
        for side in BATCHES
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for side in BATCHES:
        assert torch.equal(actual[side], expected[side])


def test_data_parallel_replica_in_its_own_thread():
    model = attached()
    replica = copy.copy(model)  # what replicate() does: the same class, a copy of the dictionary
    assert type(replica) is type(model) and torch.equal(logits(replica), logits(model))
    layer = model.model.layers[0]._replicate_for_data_parallel()
    assert type(layer) is type(model.model.layers[0])


def test_inference_mode():
    model = attached()
    with torch.inference_mode():
        actual = model(input_ids=IDS, attention_mask=LEFT, position_ids=positions(LEFT)).logits
    assert torch.equal(actual, logits(model))


def test_hidden_states_are_still_collected():
    with torch.no_grad():
        actual = attached()(input_ids=IDS, attention_mask=LEFT, output_hidden_states=True).hidden_states
    assert len(actual) == 3 and all(each.shape == (3, 7, 32) for each in actual)


@pytest.mark.parametrize(
    "kwargs",
    [{"attention_mask": LEFT}, {}, {"position_ids": torch.arange(7)[None] % 4}],
    ids=["mask", "nothing", "positions"],
)
def test_compiles_without_a_graph_break(kwargs):
    torch.compiler.reset()
    model = toy_alora.to_compile()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = logits(model, IDS, None, **kwargs)
    real = LEFT.bool() if "attention_mask" in kwargs else slice(None)
    for _ in range(2):
        assert relative_error(logits(compiled, IDS, None, **kwargs)[real], expected[real]) < 1e-10
    assert nothing_is_set()


def test_compiled_gradients():
    torch.compiler.reset()
    model = toy_alora.to_compile()
    expected = gradients(model, use_cache=False)
    actual = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), use_cache=True)
    for name, gradient in actual.items():
        assert relative_error(gradient, expected[name.removeprefix("_orig_mod.")]) < 1e-10


def test_cache_that_does_not_reach_the_layers_is_refused():
    model = attached().train()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(ValueError, match="past_key_values does not reach"):
        model(input_ids=IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize("use_cache", (None, True, False))
@pytest.mark.parametrize("training", (False, True))
def test_positions_pack_where_they_pack_for_the_model(use_cache, training):
    """Beside a cache transformers takes positions that start again for one sequence; the adapter then does as well."""
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).train(training)
    ids = torch.randint(3, 61, (1, 10))
    other = ids.clone()
    other[0, :4] = 7
    given = dict(position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]]))
    given |= {} if use_cache is None else {"use_cache": use_cache}
    seen = {}

    def differs(forward, of):
        found = [(forward(x), seen[of])[1][:, 4:] for x in (ids, other)]
        return not torch.allclose(*found, atol=1e-6)

    def keep(name):
        return lambda module, args, output: seen.update({name: output})

    model.model.layers[0].self_attn.register_forward_hook(lambda m, a, o: seen.update(model=o[0]))
    packed = not differs(lambda x: model(x, **given), "model")
    config = ALoRAConfig(r=8, num_heads=2, target_modules=["q_proj"], init_weights=False)
    patched = patch(model, config)
    patched.base_model.model.model.layers[0].self_attn.q_proj.register_forward_hook(keep("adapter"))
    assert differs(lambda x: patched(x, **given), "adapter") == (not packed)
    assert packed == (use_cache is False)
