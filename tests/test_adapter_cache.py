"""The past of an adapter beside the model's cache: what is done to one is done to both, and misfits are refused."""

import copy
import pickle

import pytest
import torch
import toy_alora
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicLayer

from gci_kernels.generation import model_cache
from gci_kernels.generation.adapter_cache import AdapterCache
from gci_kernels.generation.model_cache import get_or_create

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS, IDS, attached, toys = toy_alora.CONFIGS, toy_alora.IDS, toy_alora.attached, toy_alora.toys
R = 3


def random_kv(batch: int, time: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, time, R), torch.randn(batch, time, R)


def write(cache: Cache, k: Tensor, v: Tensor, adapters: tuple[str, ...] = ("a",)) -> list[tuple[Tensor, Tensor]]:
    """One forward: the same numbers go to an adapter's cache and, as one head, to both layers of the model's."""
    past = model_cache.length(cache)
    kept = get_or_create(cache)
    results = []
    for adapter in adapters:
        kept.keep("layer", adapter, torch.cat((k, v), 2), past=past)
        with torch.no_grad():
            results.append(kept.past("layer", adapter, past + k.shape[1], torch.cat((k, v), 2)).chunk(2, 2))
    for layer in range(2):
        cache.update(k[:, None], v[:, None], layer)
    return results


OPERATIONS = {
    "append": lambda cache, batch: write(cache, *random_kv(batch, 1)),
    "append 5": lambda cache, batch: write(cache, *random_kv(batch, 5)),
    "reorder": lambda cache, batch: cache.reorder_cache(torch.randint(batch, (batch,))),
    "crop": lambda cache, batch: cache.crop(-min(2, model_cache.length(cache))),
    "crop nothing": lambda cache, batch: cache.crop(0),
    "repeat": lambda cache, batch: cache.batch_repeat_interleave(2),
    "select": lambda cache, batch: cache.batch_select_indices(torch.randperm(batch)[: (batch + 1) // 2]),
    "reset": lambda cache, batch: cache.reset(),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("config", [None, "llama"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_done_to_the_cache_is_done_to_the_adapters(mode, config, seed):
    torch.manual_seed(seed)
    cache = DynamicCache(config=CONFIGS[config]()) if config else DynamicCache()
    batch = 2
    with mode():
        write(cache, *random_kv(batch, 4))
        for step in torch.randint(len(OPERATIONS), (40,)).tolist():
            name = list(OPERATIONS)[step]
            if name == "repeat" and batch > 8:
                continue
            OPERATIONS[name](cache, batch)
            if name == "reset" or not model_cache.length(cache):
                write(cache, *random_kv(batch, 2))
            batch = cache.layers[0].keys.shape[0]
            entry = cache.gci_adapters._entries["layer", "a"]
            k, v = entry.kv[:, : entry.length].chunk(2, 2)
            assert torch.equal(k, cache.layers[1].keys[:, 0]), name
            assert torch.equal(v, cache.layers[1].values[:, 0]), name
        (k, v), *_ = write(cache, *random_kv(batch, 1))
    assert torch.equal(k, cache.layers[0].keys[:, 0]) and torch.equal(v, cache.layers[0].values[:, 0])


@pytest.mark.smoke
def test_static_cache():
    cache = StaticCache(config=CONFIGS["llama"](), max_cache_len=12)
    with torch.no_grad():
        for time in (4, 1, 1, 3):
            (k, v), *_ = write(cache, *random_kv(2, time))
            total = model_cache.length(cache)
            assert total == int(cache.get_seq_length()) == k.shape[1]
            assert torch.equal(k, cache.layers[0].keys[:, 0, :total])
            assert torch.equal(v, cache.layers[1].values[:, 0, :total])
        cache.reorder_cache(torch.tensor([1, 1]))
        entry = cache.gci_adapters._entries["layer", "a"]
        assert entry.kv.shape[1] == 12 and torch.equal(entry.kv[:, :total, :R], cache.layers[0].keys[:, 0, :total])
        cache.reset()
        assert model_cache.length(cache) == 0
        (k, _), *_ = write(cache, *random_kv(3 - 1, 2))
        assert torch.equal(k, cache.layers[0].keys[:, 0, :2])


def test_appending_a_token_moves_no_others():
    cache, places = DynamicCache(), set()
    with torch.no_grad():
        for _ in range(100):
            (k, _), *_ = write(cache, *random_kv(1, 1))
            places.add(k.data_ptr())
    assert len(places) <= 8


def test_buffers_from_inference_mode_are_left_when_it_ends():
    cache = DynamicCache()
    with torch.inference_mode():
        write(cache, *random_kv(2, 4))
        write(cache, *random_kv(2, 1))  # makes a larger buffer
    with torch.no_grad():
        (k, _), *_ = write(cache, *random_kv(2, 1))
    assert not k.is_inference() and torch.equal(k, cache.layers[0].keys[:, 0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_are_independent(duplicate):
    cache = DynamicCache()
    with torch.no_grad():
        write(cache, *random_kv(2, 3))
        twin = duplicate(cache)
        assert type(twin) is type(cache) and isinstance(twin, DynamicCache) and type(twin).__name__ == "DynamicCache"
        (before, _), *_ = write(cache, *random_kv(2, 1))
        (k, _), *_ = write(twin, *random_kv(2, 2))
    assert (cache.get_seq_length(), twin.get_seq_length()) == (4, 5)
    assert torch.equal(k, twin.layers[0].keys[:, 0]) and torch.equal(before, cache.layers[0].keys[:, 0])


def test_a_past_whose_gradient_would_be_lost_is_refused():
    cache = AdapterCache(0, 0)
    cache.keep("layer", "a", torch.randn(2, 3, R), past=0)
    with pytest.raises(ValueError, match="filled while gradients were recorded.*adapter 'a'.*torch.no_grad"):
        cache.past("layer", "a", 3, torch.empty(2, 0, R))
    with torch.no_grad():
        assert cache.past("layer", "a", 3, torch.empty(2, 0, R)).shape == (2, 3, R)


def test_what_autograd_may_hold_is_not_written_into():
    kv = torch.randn(2, 4, R)
    cache = AdapterCache(0, 0)
    cache.keep("layer", "a", kv, past=0)
    before = kv.clone()
    cache.crop(2)
    with torch.no_grad():
        cache.keep("layer", "a", torch.randn(2, 1, R), past=2)
    assert torch.equal(kv, before)


@pytest.mark.parametrize(
    ("kv", "past", "message"),
    [
        (torch.ones(2, 1, R), 4, "holds 4 tokens, but 3 tokens of adapter 'a' of layer 'layer'"),
        (torch.ones(2, 1, R), 0, "holds 0 tokens, but 3"),
        (torch.ones(1, 1, R), 3, "batch size is 2 there and 1 here"),
        (torch.ones(2, 1, R + 1), 3, "width is 3 there and 4 here"),
        (torch.ones(2, 1, R).double(), 3, "dtype is torch.float32 there and torch.float64"),
        (torch.ones(2, 1, R, device="meta"), 3, "device is cpu there and meta here"),
        (torch.ones(2, R), 3, "kv must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_and_changes_nothing(kv, past, message):
    cache = AdapterCache(0, 0)
    with torch.no_grad():
        first = torch.randn(2, 3, R)
        cache.keep("layer", "a", first, past=0)
        with pytest.raises(ValueError, match=message):
            cache.keep("layer", "a", kv, past=past)
        cache.keep("layer", "a", torch.ones(2, 1, R), past=3)
        with pytest.raises(ValueError, match="width is 3 there and 5 here"):
            cache.past("layer", "a", 4, torch.empty(2, 0, 5))
        kept = cache.past("layer", "a", 4, torch.empty(2, 0, R))
    assert torch.equal(kept[:, :3], first) and kept.shape == (2, 4, R)


class _OtherLayer(DynamicLayer):
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
            "is a EncoderDecoderCache.*DynamicCache and",
        ),
        (lambda: type("MyCache", (DynamicCache,), {})(), "is a MyCache.*DynamicCache and StaticCache"),
        (lambda: Cache(layers=[DynamicLayer(), DynamicLayer()]), "is a Cache;.*DynamicCache and StaticCache"),
        (lambda: _with(DynamicCache(), offloading=True), "is a DynamicCache with offloading"),
        (lambda: _with(DynamicCache(), layers=[_OtherLayer()]), "layers of .*_OtherLayer.*dynamic and static layers"),
    ],
    ids=["EncoderDecoderCache", "subclass", "Cache", "offloading", "layer"],
)
def test_caches_that_are_not_supported_are_named(make, message):
    cache = make()
    before = type(cache)
    with pytest.raises(TypeError, match=message):
        get_or_create(cache)
    assert type(cache) is before and "gci_adapters" not in vars(cache)
    model = attached()
    if isinstance(cache, EncoderDecoderCache):
        return
    with pytest.raises(TypeError, match=message), torch.no_grad():
        model(input_ids=IDS, past_key_values=cache)
    for toy in toys(model):
        toy.enabled = False
    if not cache.offloading:
        model(input_ids=IDS, past_key_values=cache)
        assert cache.get_seq_length() == 7


def _with(cache: Cache, **attributes) -> Cache:
    vars(cache).update(attributes)
    return cache
