"""Decoding steps on a static cache: in one graph of torch.compile, and as the host takes them for a GPU."""

import pytest
import torch
from toy_decoding import IDS, METHODS, adapted
from transformers import StaticCache

from gci_kernels.accuracy import relative_error
from gci_kernels.generation import forward_context
from gci_kernels.ops.decode import plan
from gci_kernels.tuners import ALoRALinear
from gci_kernels.tuners.alora import may_replay

pytestmark = pytest.mark.usefixtures("poisoned")


# torch.compile


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("padded", (False, True))
def test_a_compiled_step_on_a_static_cache(method, padded):
    """One graph, whole and made once, runs at every length of the sequence, and gives what eager steps give."""
    model = adapted(method)
    mask = torch.ones_like(IDS)
    mask[0, :2] = 1 - int(padded)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    results = []
    for call in (model, compiled):
        cache, rows = StaticCache(config=model.config, max_cache_len=24), []
        whole = torch.zeros(2, 1, 1, 24, dtype=torch.bool)
        with torch.no_grad():
            model(IDS, attention_mask=mask, past_key_values=cache)
            for step in range(9):
                token = (IDS[:, :1] + step) % 97
                seen = whole.clone()
                seen[:, 0, 0, :5] = mask.bool()
                seen[..., 5 : 6 + step] = True
                position = torch.full((2, 1), 5 + step)
                rows.append(call(token, attention_mask=seen, past_key_values=cache, position_ids=position).logits)
        results.append(torch.cat(rows, 1))
    assert relative_error(results[1], results[0]) < 1e-5
    assert len(graphs) == 1
    operator = "decode_attend" if method == "alora" else "decode"
    taken = [node for node in graphs[0].graph.nodes if node.op == "call_function" and operator in str(node.target)]
    assert len(taken) == 6


@pytest.mark.parametrize("method", METHODS)
def test_an_eager_step_follows_compiled_ones(method):
    """The count that the process keeps beside a static cache is the cache's own again."""
    model, cache = adapted(method), None
    compiled = torch.compile(model, backend="eager")
    steps = [IDS[:, step : step + 1] for step in range(5)]
    with torch.no_grad():
        whole = model(torch.cat((IDS, *steps), 1)).logits[:, 5:]
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(IDS, past_key_values=cache)
        calls = (model, compiled, compiled, model, compiled)
        rows = [call(token, past_key_values=cache).logits for call, token in zip(calls, steps, strict=True)]
        assert relative_error(torch.cat(rows, 1), whole) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_inductor_compiles_a_step(method):
    model = adapted(method)
    with torch.no_grad():
        caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
        for cache in caches:
            model(IDS, past_key_values=cache)
        compiled = torch.compile(model)
        for token in IDS.t()[:, :, None].repeat(1, 1, 1):
            eager, graph = (
                call(token, past_key_values=cache).logits for call, cache in zip((model, compiled), caches, strict=True)
            )
            assert relative_error(graph, eager) < 1e-5


# What the host does for a GPU


@pytest.fixture
def as_on_gpu(monkeypatch):
    """The length of a static cache is read on the device alone, as on one that is asynchronous."""
    monkeypatch.setattr(forward_context, "_is_asynchronous", lambda device: True)


def static(model, ids=IDS, capacity=12, **given):
    """A static cache that holds `ids`."""
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    model(ids, past_key_values=cache, **given)
    return cache


MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("kind", ("none", "growing", "whole", "4-D"))
@pytest.mark.parametrize("takes", (True, False))
@pytest.mark.parametrize("targets", (["gate_proj", "q_proj"], ["down_proj"]), ids=str)
def test_steps_that_count_on_the_device(kind, takes, targets, as_on_gpu, steps, without):
    """Layers whose step no kernel takes find their past as well, also those behind the first layer's own attention."""
    model = adapted("alora", target_modules=targets)
    ids, given = torch.cat((IDS, IDS.flip(1)), 1), {} if kind == "none" else {"attention_mask": MASK}
    seen = torch.cat((MASK, torch.ones_like(MASK)), 1)
    with torch.no_grad():
        whole = model(ids, attention_mask=seen if given else None).logits
        cache = static(model, **given)
        if not takes:
            without()
        del steps[:]
        for at in range(5, 10):
            if kind == "growing":
                given = {"attention_mask": seen[:, : at + 1]}
            elif kind == "whole":
                given = {"attention_mask": torch.cat((seen[:, : at + 1], torch.zeros(2, 11 - at, dtype=int)), 1)}
            elif kind == "4-D":
                mask = torch.zeros(2, 1, 1, 12, dtype=torch.bool)
                mask[:, 0, 0, : at + 1] = seen[:, : at + 1].bool()
                given = {"attention_mask": mask, "position_ids": torch.full((2, 1), at)}
            row = model(ids[:, at : at + 1], past_key_values=cache, **given).logits
            assert relative_error(row[:, 0], whole[:, at]) < 1e-5
            assert not takes or cache.gci_adapters.tokens is None, "the process counts nothing"
    assert all(steps) and len(steps) == takes * 5 * 2 * len(targets)


def test_a_layer_without_a_kernel_among_others(as_on_gpu, monkeypatch):
    """What one layer found out is no news to those that count on the device."""
    model, ids = adapted("alora"), torch.cat((IDS, IDS.flip(1)), 1)
    own = ALoRALinear._step
    monkeypatch.setattr(ALoRALinear, "_step", lambda self, *args: None if "down" in self.key else own(self, *args))
    with torch.no_grad():
        whole, cache = model(ids).logits, static(model)
        for at in range(5, 10):
            row = model(ids[:, at : at + 1], past_key_values=cache).logits
            assert relative_error(row[:, 0], whole[:, at]) < 1e-5


def test_an_adapter_that_missed_tokens_is_refused(as_on_gpu):
    model = adapted("alora")
    with torch.no_grad():
        cache = static(model)
        model(IDS[:, :1], past_key_values=cache)
        with model.disable_adapter():
            model(IDS[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="holds 7 tokens, but 6 tokens of adapter"):
            model(IDS[:, :1], past_key_values=cache)


def test_what_no_kernel_will_take_is_counted_by_the_process(as_on_gpu):
    model = adapted("alora")
    with torch.no_grad():
        wide = static(model, IDS[:1].expand(17, -1))
        model(IDS[:1, :1].expand(17, -1), past_key_values=wide)
        assert wide.gci_adapters.tokens == 6
    asked = 2, torch.float32, torch.device("cpu")
    assert may_replay(*asked) and not may_replay(2, torch.float64, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not may_replay(*asked)


def test_a_graph_reads_no_further_than_a_short_mask(as_on_gpu, monkeypatch):
    model, seen = adapted("alora"), []
    cls = forward_context.LayerContext
    own = cls.reserve
    monkeypatch.setattr(cls, "reserve", lambda self, *args: seen.append(own(self, *args)) or seen[-1])
    with torch.no_grad():
        cache = static(model)
        model(IDS[:, :1], attention_mask=torch.ones(2, 6), past_key_values=cache)  # floating: looked at
        model(IDS[:, :1], attention_mask=torch.ones(2, 7, dtype=int), past_key_values=cache)
        assert seen[-1][2].tolist() == [[0] * 7 + [-1] * 5] * 2 and seen[-1][2].dtype == torch.int32
        with pytest.raises(ValueError, match="a 4-D mask must be causal"):
            heads = torch.ones(2, 4, 1, 12, dtype=torch.bool)
            model(IDS[:, :1], attention_mask=heads, past_key_values=cache)


def test_counting_on_the_device_needs_the_kernel_of_attention_too(monkeypatch):
    monkeypatch.setattr(plan, "BUILT", {"cuda": (torch.bfloat16,)})
    for proved in (("decode_step", "decode_attend"), ("decode_step",), ("decode_attend",)):
        monkeypatch.setattr(plan.hardware, "proves", lambda kernel, dtype, device, proved=proved: kernel in proved)
        assert plan.has_kernels(torch.bfloat16, "cuda") == ("decode_step" in proved)
        assert plan.has_kernels(torch.bfloat16, "cuda", attends=True) == (len(proved) == 2)
