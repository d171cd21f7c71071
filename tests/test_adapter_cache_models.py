"""Models that generate with the past of their adapters beside the cache: as recomputed, and misfits are refused."""

import copy

import pytest
import torch
import toy_alora
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

from gci_kernels.accuracy import relative_error
from gci_kernels.generation import sequence

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES, ExpectedEntries, IDS, MASK = toy_alora.FAMILIES, toy_alora.ExpectedEntries, toy_alora.IDS, toy_alora.LEFT
attached, plain, toys, with_toys = toy_alora.attached, toy_alora.plain, toy_alora.toys, toy_alora.with_toys


MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
}


def generate(model: nn.Module, ids: Tensor = IDS, mask: Tensor | None = MASK, *, new: int = 9, **kwargs) -> Tensor:
    torch.manual_seed(3)
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, **kwargs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_recomputing_each_step(family, mode):
    model = attached(family)
    actual = generate(model, use_cache=True, **MODES[mode])
    calls = toys(model)[0].calls
    assert torch.equal(actual, generate(model, use_cache=False, **MODES[mode]))
    assert calls == 9 and not torch.equal(actual, generate(plain(family), **MODES[mode]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "gpt2"])
def test_static_cache_in_generation(family, mode):
    model = attached(family)
    actual = generate(model, cache_implementation="static", **MODES[mode])
    assert torch.equal(actual, generate(model, use_cache=False, **MODES[mode]))


@pytest.mark.parametrize("padded", [True, False])
def test_static_cache_of_sliding_layers_only(padded):
    model = attached("mistral")
    options = dict(mask=MASK if padded else torch.ones_like(MASK), do_sample=False)
    actual = generate(model, cache_implementation="static", **options)
    assert torch.equal(actual, generate(model, use_cache=False, **options))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("assistant", ["prompt lookup", "same", "other"])
def test_assisted_decoding(family, assistant):
    model, ids = attached(family), torch.tensor([[5, 17, 52, 3, 5, 17, 52, 9, 5, 17]])
    helper = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "same": {"assistant_model": plain(family)},
        "other": {"assistant_model": attached(family, seed=1)},
    }[assistant]
    actual = generate(model, ids, torch.ones_like(ids), do_sample=False, new=12, **helper)
    assert torch.equal(actual, generate(model, ids, None, do_sample=False, new=12, use_cache=False))


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_cache_is_used_again_by_a_second_generate(kind):
    model = attached()
    size = {"max_cache_len": 40} if kind is StaticCache else {}
    cache = kind(config=model.config, **size)
    first = generate(model, IDS[:1], MASK[:1], do_sample=False, new=4, past_key_values=cache)
    more = torch.cat([first, torch.tensor([[7, 8, 9]])], 1)
    twin = copy.deepcopy(cache)
    expected = generate(model, more, torch.ones_like(more), do_sample=False, new=5, use_cache=False)
    for each in (cache, twin):
        second = generate(model, more, torch.ones_like(more), do_sample=False, new=5, past_key_values=each)
        assert torch.equal(second, expected)


def test_prompt_in_pieces_with_gradients_is_refused():
    model = attached()
    cache = DynamicCache(config=model.config)
    model(input_ids=IDS[:, :4], past_key_values=cache)
    with pytest.raises(ValueError, match="filled while gradients were recorded"):
        model(input_ids=IDS[:, 4:], past_key_values=cache)


def test_training_after_a_prompt_without_gradients():
    """The past is a constant, and what comes after it learns: the gradients of a past made so equal the op's own."""
    model = attached()
    whole = _run(model, DynamicCache())[:, 4:]
    cache = DynamicCache(config=model.config)
    _run(model, cache, IDS[:, :4])
    logits = model(input_ids=IDS[:, 4:], past_key_values=cache).logits
    assert relative_error(logits, whole) < 1e-10
    logits.square().sum().backward()
    assert all(toy.qkv.grad.isfinite().all() for toy in toys(model))


def test_training_with_use_cache_changes_nothing():
    model, found = attached().train(), []
    for use_cache in (False, True):
        model.zero_grad()
        model(input_ids=IDS, use_cache=use_cache).logits.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert all(relative_error(found[1][name], gradient) < 1e-12 for name, gradient in found[0].items())


# Caches that do not fit


def contents(cache: Cache) -> dict:
    """All that a cache holds."""
    kept = getattr(cache, "gci_adapters", None)
    return {
        "model": [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers],
        "length": cache.get_seq_length(),
        "adapters": {} if kept is None else {key: (e.kv.clone(), e.length) for key, e in kept._entries.items()},
    }


def equal(one, other) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(*pair) for pair in zip(one, other, strict=True))
    return one == other


def _run(model: nn.Module, cache: Cache, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache).logits


def filled_by(model: nn.Module) -> Cache:
    cache = DynamicCache(config=model.config)
    _run(model, cache)
    return cache


def disabled() -> nn.Module:
    model = attached()
    for toy in toys(model):
        toy.enabled = False
    return model


def longer_than_its_adapters() -> Cache:
    model = attached()
    cache = filled_by(model)
    for toy in toys(model):
        toy.enabled = False
    _run(model, cache, IDS[:, :2])
    return cache


MISFITS = {
    "another model": lambda: filled_by(plain()),
    "adapters disabled": lambda: filled_by(disabled()),
    "disabled for a while": longer_than_its_adapters,
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("where", ["everywhere", "down_proj"])
def test_cache_that_does_not_fit_is_refused_and_unharmed(misfit, where):
    model = with_toys(plain())
    for toy in toys(model):
        toy.enabled = where == "everywhere" or toy.key.endswith(where)
    sequence.attach(model, ExpectedEntries(model))
    cache = MISFITS[misfit]()
    before = contents(cache)
    with pytest.raises(ValueError, match=r"past_key_values holds \d tokens, but [07] tokens of adapter 'toy' of layer"):
        _run(model, cache, IDS[:, :1])
    assert equal(contents(cache), before)
    assert _run(plain(), cache, IDS[:, :1]).isfinite().all()


@pytest.mark.parametrize("expected", [False, True])
def test_cache_of_another_rank(expected):
    model = with_toys(plain(), rank=4)
    sequence.attach(model, ExpectedEntries(model) if expected else None)
    other = with_toys(plain(), rank=6)
    sequence.attach(other)
    cache = filled_by(other)
    before = contents(cache)
    with pytest.raises(ValueError, match="width is 12 there and 8 here"):
        _run(model, cache, IDS[:, :1])
    assert equal(contents(cache), before)
    assert _run(other, cache, IDS[:, :1]).isfinite().all()


def test_cropped_to_where_the_adapter_was_disabled_it_fits_again():
    model = attached()
    cache = longer_than_its_adapters()
    cache.crop(-3)
    actual = _run(model, cache, IDS[:, 6:])
    assert relative_error(actual, _run(model, DynamicCache())[:, 6:]) < 1e-10


def test_packed_cache_cannot_be_continued():
    model = attached()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=IDS[:1], cu_seq_lens_q=torch.tensor([0, 4, 7]), past_key_values=cache)
    with pytest.raises(ValueError, match="packed sequences"):
        _run(model, cache, IDS[:1, :1])


def test_detached_model_leaves_a_cache_that_still_works():
    model = with_toys(plain())
    handle = sequence.attach(model)
    cache = filled_by(model)
    for toy in toys(model):
        toy.enabled = False
    handle.detach()
    assert _run(model, cache, IDS[:, :1]).isfinite().all() and cache.get_seq_length() == 8


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_compiled_steps_equal_eager_ones(kind):
    torch.compiler.reset()
    model = toy_alora.to_compile()
    size = {"max_cache_len": 12} if kind is StaticCache else {}
    caches = [kind(config=model.config, **size) for _ in range(2)]
    for cache in caches:
        _run(model, cache, IDS[:, :3])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for part in IDS[:, 3:].split(1, 1):
        outputs = [_run(each, cache, part) for each, cache in zip((model, compiled), caches, strict=True)]
        assert relative_error(outputs[1], outputs[0]) < 1e-10
        assert sequence.current() is None


def test_compiled_forward_that_makes_its_cache():
    torch.compiler.reset()
    model = toy_alora.to_compile()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        cache = compiled(input_ids=IDS[:, :6], use_cache=True).past_key_values
    expected = _run(model, DynamicCache())[:, 6:]
    assert relative_error(_run(model, cache, IDS[:, 6:]), expected) < 1e-10
    cache = compiled(input_ids=IDS[:, :6], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="compiled forward with gradients"):
        _run(model, cache, IDS[:, 6:])
