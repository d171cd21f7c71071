"""Adapted layers in generation: which of them take decoding steps, with the same tokens as without; mixed batches."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from gci_kernels import ALoRAConfig, LoKIConfig, LoRAMoEConfig, frame, patch, report
from gci_kernels.ops.decode import plan
from gci_kernels.testing import relative_error
from gci_kernels.tuners import ALoRALinear, FusedLoraLinear, LoRAMoELinear, fusion

pytestmark = pytest.mark.usefixtures("poisoned")

METHODS = ("lora", "loramoe", "alora")
TARGETS = ["gate_proj", "down_proj", "q_proj"]
IDS = torch.tensor([[5, 17, 80, 3, 41], [8, 2, 36, 62, 8]])


def tiny_llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def config(method, **changes):
    if method == "alora":
        return ALoRAConfig(**dict(r=8, num_heads=2, target_modules=TARGETS, init_weights=False) | changes)
    if method == "lora":
        return LoraConfig(**dict(r=4, target_modules=TARGETS, init_lora_weights=False) | changes)
    if method == "loki":
        return LoKIConfig(positions=[[3, 9, 40]] * 2, **changes)
    return LoRAMoEConfig(**dict(r=4, num_experts=4, target_modules=TARGETS, init_weights=False) | changes)


def adapted(method, dtype=torch.float32, **changes):
    torch.manual_seed(1)
    return patch(tiny_llama(dtype), config(method, **changes)).eval()


@pytest.fixture
def steps(monkeypatch):
    """Whether a kernel took a layer's step, each time that it was asked."""
    answers = []

    def record(cls):
        own = cls._step

        def step(*args):
            result = own(*args)
            answers.append(result is not None)
            return result

        monkeypatch.setattr(cls, "_step", step)

    for cls in (FusedLoraLinear, LoRAMoELinear, ALoRALinear):
        record(cls)
    return answers


@pytest.fixture
def without(monkeypatch):
    """Takes the kernels for steps away."""
    return lambda: monkeypatch.setattr(fusion, "decodes", lambda x: False)


def settings(ids, **changes):
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False) | changes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_generation_takes_steps_and_gives_the_same_tokens(method, dtype, steps, without):
    model = adapted(method, dtype)
    tokens = model.generate(**settings(IDS))
    prompt = [False] * 6 if method == "alora" else []  # ten tokens: more than one for each sequence
    assert steps == prompt + [True] * 7 * 6 or steps == [True] * 8 * 6
    with torch.no_grad():
        one = model(IDS[:, :1]).logits  # where ALoRA's new token is its whole past
        without()
        assert relative_error(model(IDS[:, :1]).logits, one) < (1e-5 if dtype == torch.float32 else 3e-2)
    if dtype == torch.float32:
        assert torch.equal(model.generate(**settings(IDS)), tokens)


@pytest.mark.parametrize("hooked", (False, True))
@pytest.mark.parametrize("method", METHODS)
def test_several_adapters_add_up(method, hooked, steps, without):
    """The second adds to what the first returned, and where the base layer has hooks the first adds to its output."""
    model = adapted(method)
    model.add_adapter("other", config(method))
    patch(model)
    model.eval().base_model.set_adapter(["default", "other"])
    seen = []
    for module in model.modules():
        if hooked and hasattr(module, "base_layer"):
            module.base_layer.register_forward_hook(lambda module, args, y: seen.append((y, y.clone())))
    with torch.no_grad():
        logits = model(IDS[:, :1], use_cache=True).logits
        assert steps == [True] * 12
        assert len(seen) == 6 * hooked and all(torch.equal(*pair) for pair in seen), "what a hook saw is left alone"
        without()
        assert relative_error(logits, model(IDS[:, :1]).logits) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_calls_that_are_no_steps(method, steps):
    model = adapted(method)
    model(IDS[:, :1])  # gradients are wanted
    with torch.no_grad():
        model(IDS.repeat(2, 1))  # too many tokens
        with torch.autocast("cpu", torch.bfloat16):
            model(IDS[:, :1])
        model.double()(IDS[:, :1])  # which no kernel takes
    assert steps == []


class Doubled(nn.Linear):
    """A base layer that only itself knows how to run, as quantised ones are."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("method", METHODS)
def test_a_base_layer_of_another_class_runs_itself(method, steps, without):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.gate_proj.__class__ = Doubled
    torch.manual_seed(1)
    model = patch(model, config(method)).eval()
    with torch.no_grad():
        logits = model(IDS[:, :1], use_cache=True).logits
        assert steps == [True] * 6
        without()
        assert relative_error(logits, model(IDS[:, :1]).logits) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_dropout_in_training_is_no_step_of_the_kernel(method, steps):
    model = adapted(method, lora_dropout=0.5).train()
    with torch.no_grad():
        first, second = (model(IDS[:, :1]).logits for _ in range(2))
        assert not torch.equal(first, second)
        model.eval()(IDS[:, :1], use_cache=True)
    assert steps == [False] * 12 + [True] * 6


@pytest.mark.parametrize("method", ("lora", "loramoe"))
def test_dropout_in_training_is_no_mixed_step_either(method):
    layer = adapted(method, lora_dropout=0.5).train().base_model.model.model.layers[0].mlp.gate_proj
    x, names = torch.randn(2, 1, 64), ["default", "__base__"]
    with torch.no_grad():
        first, second = (layer(x, adapter_names=names) for _ in range(2))
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


MODES = {
    "left-padded": {}, "beams": {"num_beams": 3}, "static": {"cache_implementation": "static"},
    "assisted": {"prompt_lookup_num_tokens": 3},
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_alora_generates_with_steps_what_it_would_without(mode, steps):
    model = adapted("alora").double()  # which no kernel takes: the truth
    ids = torch.tensor([[0, 0, 7, 3, 41], [8, 2, 36, 62, 8]])
    if mode == "assisted":
        ids = torch.tensor([[5, 17, 5, 17, 5]])
    generate = settings(ids, attention_mask=(ids != 0).long(), max_new_tokens=9, **MODES[mode])
    expected = model.generate(**generate)
    assert True not in steps
    model.float()
    del steps[:]
    assert torch.equal(model.generate(**generate), expected) and True in steps


def test_a_layer_of_peft_with_a_bias_of_its_own():
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)
    )
    with torch.no_grad():
        before = model.eval()(IDS[:, :1]).logits
        assert relative_error(patch(model)(IDS[:, :1]).logits, before) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_report_names_what_a_step_launches(method):
    model = adapted(method)
    assert {line.decode for line in report(model)} == {"decode"}
    assert "decoding step" in str(report(model))
    assert {line.decode for line in report(model.double())} == {None}


# Mixed batches


NAMES = ["other", "__base__", "default", "other"]
BATCH = torch.cat((IDS, IDS.flip(1)))


def with_two(method):
    model = adapted(method)
    torch.manual_seed(2)
    if method == "lora":
        changes = {"r": 6}
    else:
        changes = {"alora": dict(r=12, num_heads=3, residual=True), "loramoe": dict(num_experts=2, top_k=1)}.get(
            method, {}
        )
    second = LoKIConfig(positions=[[1, 5]] * 2) if method == "loki" else config(method, **changes)
    model.add_adapter("other", second)
    patch(model)
    for name, parameter in model.named_parameters():
        if "loki_active" in name:
            parameter.data.normal_()
    return model.eval()


def alone(model, call):
    """What each sequence gives when it runs by itself, with its adapter alone."""
    results = []
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                results.append(call(row))
        else:
            model.set_adapter(name)
            results.append(call(row))
    return torch.cat(results)


@pytest.mark.parametrize("method", (*METHODS, "loki"))
@pytest.mark.parametrize("length", (1, 4, 5))
def test_every_sequence_has_an_adapter_of_its_own(method, length):
    """Up to sixteen tokens a step of the kernel, else the stages of training; never an adapter of another row."""
    model, ids = with_two(method), BATCH[:, :length]
    with torch.no_grad():
        wanted = alone(model, lambda row: model(ids[row : row + 1]).logits)
        actual = model(ids, adapter_names=NAMES).logits
        assert relative_error(actual, wanted) < 1e-5
    with_gradients = model(ids, adapter_names=NAMES).logits
    assert relative_error(with_gradients, wanted) < 1e-5 and with_gradients.requires_grad


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ({}, {"num_beams": 2}, {"cache_implementation": "static"}), ids=str)
def test_generation_of_a_mixed_batch(method, mode, monkeypatch):
    """One call of the extension a layer and step, and the tokens that every sequence gets by itself."""
    from gci_kernels.ops.decode import native

    model, calls = with_two(method), []
    for run in ("run", "attend"):
        own = getattr(native.Step, run)
        monkeypatch.setattr(native.Step, run, lambda *args, own=own: calls.append(1) or own(*args))
    wanted = alone(model, lambda row: model.generate(**settings(BATCH[row : row + 1], **mode)))
    del calls[:]
    tokens = model.generate(**settings(BATCH, **mode), adapter_names=NAMES)
    assert torch.equal(tokens, wanted)
    assert len(calls) == 7 * 6


def test_a_mixed_batch_of_layers_without_some_adapter():
    model = adapted("loramoe")
    model.add_adapter("other", config("loramoe", target_modules=["up_proj"]))
    model.eval()
    with torch.no_grad():
        actual = model(BATCH, adapter_names=NAMES).logits
        assert relative_error(actual, alone(model, lambda row: model(BATCH[row : row + 1]).logits)) < 1e-5


@pytest.mark.parametrize("method", ("loramoe", "alora", "loki"))
def test_wrong_names_are_named(method):
    model = with_two(method)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    for names, error, message in (
        (["default"] * 3, ValueError, "for each of the 4 inputs, got 3"),
        (["default", "othr", "__base__", "other"], ValueError, r"no adapter \['othr'\]; there are .*'default'"),
        ("default", TypeError, "adapter_names must be a list of strings"),
    ):
        with pytest.raises(error, match=message):
            model(BATCH, adapter_names=names)
    with pytest.raises(ValueError, match="for inference"):
        model.train()(BATCH, adapter_names=NAMES)
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    with torch.no_grad():
        model.eval()(BATCH)


def test_a_cache_of_a_mixed_batch_goes_on_with_the_same_names_only():
    model = with_two("alora")
    with torch.no_grad():
        cache = model(BATCH, adapter_names=NAMES, use_cache=True).past_key_values
        for names in (None, NAMES[::-1]):
            with pytest.raises(ValueError, match="holds 5 tokens, but 0 tokens of adapter"):
                model(BATCH[:, :1], past_key_values=copy.deepcopy(cache), adapter_names=names)
        together = model(torch.cat((BATCH, BATCH[:, :1]), 1), adapter_names=NAMES).logits[:, -1:]
        actual = model(BATCH[:, :1], past_key_values=cache, adapter_names=NAMES).logits
        assert relative_error(actual, together) < 1e-5


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
    """The length of a static cache is the device's to know, as it is where that runs by itself."""
    monkeypatch.setattr(frame, "_runs_by_itself", lambda device: True)


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
        asked = static(model), None, model.base_model.wanted, 2, torch.device("cpu")
        assert frame._counts_on_device(*asked)
        with torch.autocast("cpu", torch.bfloat16):
            assert not frame._counts_on_device(*asked)


def test_a_graph_reads_no_further_than_a_short_mask(as_on_gpu, monkeypatch):
    model, seen = adapted("alora"), []
    own = frame.Context.room
    monkeypatch.setattr(frame.Context, "room", lambda self, *args: seen.append(own(self, *args)) or seen[-1])
    with torch.no_grad():
        cache = static(model)
        model(IDS[:, :1], attention_mask=torch.ones(2, 6), past_key_values=cache)  # floating: looked at
        model(IDS[:, :1], attention_mask=torch.ones(2, 7, dtype=int), past_key_values=cache)
        assert seen[-1][2].tolist() == [[0] * 7 + [-1] * 5] * 2 and seen[-1][2].dtype == torch.int32
        with pytest.raises(ValueError, match="a 4-D mask must be causal"):
            heads = torch.ones(2, 4, 1, 12, dtype=torch.bool)
            model(IDS[:, :1], attention_mask=heads, past_key_values=cache)


def test_counting_on_the_device_needs_the_kernel_of_attention_too(monkeypatch):
    monkeypatch.setattr(plan, "_BUILT", {"cuda": (torch.bfloat16,)})
    for proved in (("decode_step", "decode_attend"), ("decode_step",), ("decode_attend",)):
        monkeypatch.setattr(plan.hardware, "proves", proved.__contains__)
        assert plan.has_kernels(torch.bfloat16, "cuda") == ("decode_step" in proved)
        assert plan.has_kernels(torch.bfloat16, "cuda", attends=True) == (len(proved) == 2)


def test_a_mixed_batch_trains_after_inference_mode():
    model = with_two("lora")
    with torch.inference_mode():
        model(BATCH, adapter_names=NAMES)
    model(BATCH, adapter_names=NAMES).logits.sum().backward()
