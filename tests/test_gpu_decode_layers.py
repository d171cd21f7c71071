"""Adapted models that decode with the CUDA C++ kernels: generation, CUDA graphs, torch.compile, mixed batches.

test_cuda_on_cpu.py runs this without a GPU: the kernels are compiled by g++, the host does what it does for a GPU, and
a tape stands for a CUDA graph.
"""

import os

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from gci_kernels import ALoRAConfig, LoRAMoEConfig, patch
from gci_kernels.accuracy import relative_error
from gci_kernels.generation import forward_context
from gci_kernels.ops import transforms
from gci_kernels.ops.decode import cuda, step
from gci_kernels.tuners import fusion

ON_CPU = os.environ.get("GCI_CUDA_ON_CPU")
DEVICE = "cpu" if ON_CPU else "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.kernel("decoding layers"), pytest.mark.usefixtures("one_thread")]

METHODS = ("lora", "loramoe", "alora")
DTYPES = (torch.float32, torch.bfloat16)
BOUND = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
TARGETS = ["gate_proj", "down_proj", "q_proj"]
ADAPTED = 2 * len(TARGETS)  # layers
PROMPT = 5
REPLAYS = 5 if ON_CPU else 100
NAMES = ["other", "__base__", "default", "other"]


class Tape(TorchDispatchMode):
    """Stands for a CUDA graph: what is done under it can be done again with the same tensors, but no value be read."""

    WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh", "aten::equal")

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __enter__(self):
        self.depth, transforms.dispatch_mode_depth = transforms.dispatch_mode_depth, lambda: 0  # as for a graph
        return super().__enter__()

    def __exit__(self, *error):
        transforms.dispatch_mode_depth = self.depth
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in self.WAITS:
            raise RuntimeError(f"{func} while a graph is captured")
        return self.run(func, *args, **(kwargs or {}))

    def run(self, function, *args, **kwargs):
        results = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, results))
        return results

    def replay(self) -> None:
        for function, args, kwargs, results in self.calls:
            for old, new in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # not a view, nor in place
                    old.copy_(new)


class Recorded:
    """The module of kernels, whose launches a tape records as well."""

    tape: Tape | None = None

    def __init__(self, module) -> None:
        self.module = module

    def __getattr__(self, name):
        function = getattr(self.module, name)
        if not name.startswith("cuda_"):
            return function
        return lambda *args: function(*args) if self.tape is None else self.tape.run(function, *args)


@pytest.fixture(autouse=True)
def recorded(kernels, monkeypatch):
    """On a CPU: the GPU's steps, and the host's way of taking them."""
    if ON_CPU is None:
        return None
    recorded = Recorded(kernels)
    monkeypatch.setattr(cuda, "extension", lambda: recorded)
    monkeypatch.setattr(step.native, "Step", cuda.Step)
    monkeypatch.setattr(step, "_steps", {})
    monkeypatch.setattr(forward_context, "_is_asynchronous", lambda device: True)
    return recorded


@pytest.fixture
def taken(monkeypatch):
    """One entry for each step that the kernels took."""
    taken = []
    for run in ("run", "attend"):
        own = getattr(cuda.Step, run)
        monkeypatch.setattr(cuda.Step, run, lambda *args, own=own: taken.append(1) or own(*args))
    return taken


def config(method, **changes):
    if method == "alora":
        return ALoRAConfig(**dict(r=8, num_heads=2, target_modules=TARGETS, init_weights=False) | changes)
    if method == "lora":
        return LoraConfig(**dict(r=4, target_modules=TARGETS, init_lora_weights=False) | changes)
    return LoRAMoEConfig(**dict(r=4, num_experts=4, target_modules=TARGETS, init_weights=False) | changes)


OTHERS = {"lora": dict(r=6), "loramoe": dict(num_experts=2), "alora": dict(r=12, num_heads=3, residual=True)}


def adapted(method, dtype=torch.float32):
    """With the adapters "default" and "other", of which the first is active."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = patch(LlamaForCausalLM(shape).to(dtype).to(DEVICE), config(method))
    model.add_adapter("other", config(method, **OTHERS[method]))
    return patch(model).eval()


def tokens(batch, length):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def captured(call, recorded):
    """`replay`, which does again what `call` does now, and where it leaves the result."""
    if recorded is not None:
        recorded.tape = Tape()
        with recorded.tape as tape:
            result = call()
        recorded.tape = None
        return tape.replay, result
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


@pytest.mark.parametrize("cache", ("dynamic", "static"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_generation_takes_the_kernels(method, dtype, cache, taken, monkeypatch):
    """Disabled is the compiler that transformers takes for a static cache on a GPU."""
    model, new = adapted(method, dtype), 6
    ids = tokens(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = dict(attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, disable_compile=True)
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    found = model.generate(input_ids=ids, **options)
    assert len(taken) in ((new - 1) * ADAPTED, new * ADAPTED)  # of LoRA the prompt, too, is few enough tokens
    if dtype == torch.float32:
        monkeypatch.setattr(fusion, "takes_steps", lambda impl, x: False)
        assert torch.equal(model.generate(input_ids=ids, **options), found)


@pytest.mark.parametrize("mixed", (False, True), ids=("one adapter", "mixed"))
@pytest.mark.parametrize("masked", (False, True), ids=("", "padded"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_graph_is_replayed_over_growing_sequences(method, dtype, masked, mixed, taken, recorded):
    """And a plain call, of one token or two, goes on behind it; then all begins again on the same cache."""
    model, end = adapted(method, dtype), PROMPT + REPLAYS
    ids, seen = tokens(4, end + 2), torch.ones(4, end + 2, dtype=torch.long, device=DEVICE)
    seen[0, :2] = 1 - int(masked)
    names = {"adapter_names": NAMES} if mixed else {}
    cache = StaticCache(config=model.config, max_cache_len=end + 2)
    token, position = ids[:, :1].clone(), torch.zeros(4, 1, dtype=torch.long, device=DEVICE)
    mask = torch.zeros(4, 1, 1, end + 2, dtype=torch.bool, device=DEVICE) if masked else None

    def call(at=0, count=1):
        return model(token, attention_mask=mask, past_key_values=cache, position_ids=position, **names).logits

    def begin():
        cache.reset()
        given = seen[:, :PROMPT] if masked else None
        model(ids[:, :PROMPT], attention_mask=given, past_key_values=cache, **names)

    def prepare(at):
        token.copy_(ids[:, at : at + 1])
        position.fill_(at)
        if masked:
            mask.zero_()
            mask[:, 0, 0, : at + 1] = seen[:, : at + 1].bool()

    with torch.no_grad():
        whole = model(ids, attention_mask=seen if masked else None, **names).logits
        begin(), prepare(PROMPT)
        plain = call()
        assert relative_error(plain[:, 0], whole[:, PROMPT]) < BOUND[dtype]
        del taken[:]
        replay, result = captured(call, recorded)
        assert len(taken) == ADAPTED * (1 if recorded else 2)
        for following in (1, 2):
            begin()
            rows = []
            for at in range(PROMPT, end):
                prepare(at)
                replay()
                rows.append(result.clone())
            assert relative_error(rows[0], plain) < BOUND[dtype] / 10
            assert relative_error(torch.cat(rows, 1), whole[:, PROMPT:end]) < BOUND[dtype]
            last, given = slice(end, end + following), seen[:, : end + following] if masked else None
            more = model(ids[:, last], attention_mask=given, past_key_values=cache, **names).logits
            assert relative_error(more, whole[:, last]) < BOUND[dtype]


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_step_is_one_graph(method, taken):
    """On a GPU in a CUDA graph of torch's own."""
    model, end = adapted(method), PROMPT + 6
    ids = tokens(2, end)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    how = {"backend": "eager"} if ON_CPU else {"mode": "reduce-overhead"}
    compiled = torch.compile(model, fullgraph=True, **how)
    cache = StaticCache(config=model.config, max_cache_len=end)
    with torch.no_grad():
        whole = model(ids).logits[:, PROMPT:]
        for _ in range(2):
            cache.reset()
            model(ids[:, :PROMPT], past_key_values=cache)
            rows, before = [], len(taken)
            for at in range(PROMPT, end):
                position = torch.full((2, 1), at, device=DEVICE)
                row = compiled(ids[:, at : at + 1], past_key_values=cache, position_ids=position).logits
                rows.append(row.clone())
            assert relative_error(torch.cat(rows, 1), whole) < BOUND[torch.float32]
            assert len(taken) > before or ON_CPU is None  # torch's graphs come to run without any of this
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(ON_CPU is not None, reason="transformers compiles for a GPU only")
def test_generation_as_transformers_compiles_it():
    model, ids = adapted("alora"), tokens(2, PROMPT)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    static = model.generate(input_ids=ids, cache_implementation="static", **options)
    assert torch.equal(static, model.generate(input_ids=ids, **options))


@pytest.mark.parametrize("cache", ("dynamic", "static"))
@pytest.mark.parametrize("method", METHODS)
def test_generation_of_a_mixed_batch(method, cache, taken):
    """Every sequence gets the tokens that it gets by itself."""
    model, new, ids = adapted(method), 5, tokens(4, PROMPT)
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, disable_compile=True)
    options |= {"cache_implementation": "static"} if cache == "static" else {}

    def alone(row):
        return model.generate(input_ids=ids[row : row + 1], attention_mask=torch.ones_like(ids[:1]), **options)

    wanted = []
    for row, adapter in enumerate(NAMES):
        if adapter == "__base__":
            with model.disable_adapter():
                wanted.append(alone(row))
        else:
            model.set_adapter(adapter)
            wanted.append(alone(row))
    del taken[:]
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=NAMES, **options)
    assert torch.equal(found, torch.cat(wanted)) and len(taken) == (new - 1) * ADAPTED
