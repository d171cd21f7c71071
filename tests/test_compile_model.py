"""torch.compile of a whole patched model, forward and backward: one graph, for every length, with eager's numbers."""

import pytest
import torch
from peft import LoraConfig
from torch._dynamo.testing import CompileCounterWithBackend
from toy_methods import HydraLoRAConfig
from transformers import LlamaConfig, LlamaForCausalLM

from gci_kernels import ALoRAConfig, LoKIConfig, LoRAMoEConfig, patch
from gci_kernels.accuracy import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

# With two sequences each has fewer than the 64 tokens from which a plan takes other kernels, which is another graph.
LENGTHS = (5, 9, 12, 30)
FEW = {"target_modules": ["q_proj", "down_proj"], "init_weights": False}
METHODS = {
    "lora": lambda p: LoraConfig(r=4, lora_dropout=p, init_lora_weights=False, target_modules=["q_proj", "down_proj"]),
    "loramoe": lambda p: LoRAMoEConfig(r=2, num_experts=4, lora_dropout=p, **FEW),
    "alora": lambda p: ALoRAConfig(r=4, num_heads=2, lora_dropout=p, **FEW),
    "hydralora": lambda p: HydraLoRAConfig(r=2, lora_dropout=p, **FEW),
    "loki": lambda p: LoKIConfig(positions=[[1, 5, 9, 30]], init_weights=False),
    "loki*": lambda p: LoKIConfig(positions=[[1, 5, 9, 30]], r=2, init_weights=False),
}
DROPPING = ("lora", "loramoe", "alora")


def quick(*methods: str) -> pytest.MarkDecorator:
    """Every method, those not named here among the slow tests alone: each compilation takes seconds."""
    marks = {method: () if method in methods else pytest.mark.slow for method in METHODS}
    return pytest.mark.parametrize("method", [pytest.param(method, marks=mark) for method, mark in marks.items()])


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


def patched(method: str, dropout: float = 0.0):
    """A tiny Llama in training mode, the same at every call."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2, use_cache=False))
    torch.manual_seed(1)
    return patch(model, METHODS[method](dropout)).train()


def batch(length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(97, (2, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "labels": ids}


def step(call, model, inputs, seed: int | None = 0) -> dict[str, torch.Tensor]:
    """The loss and the gradients of everything that trains; `seed` None: the next numbers of torch's generator."""
    model.zero_grad()
    if seed is not None:
        torch.manual_seed(seed)
    loss = call(**inputs).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach()} | {name: gradient.clone() for name, gradient in gradients.items()}


def assert_same(actual, expected, tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys() and len(expected) >= 2
    for name, value in expected.items():
        assert value.any() and relative_error(actual[name], value) < tolerance, name


def compiled(model, backend: str = "aot_eager", **kwargs):
    """The model in one graph, and what counts the graphs."""
    count = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=count, fullgraph=True, **kwargs), count


def lengths(method: str, dynamic: bool | None, known: int, backend: str = "aot_eager") -> None:
    """Eager's numbers at every length; after the first `known` of them nothing is compiled."""
    model = patched(method)
    call, count = compiled(model, backend, dynamic=dynamic)
    graphs = []
    for length in LENGTHS:
        assert_same(step(call, model, batch(length)), step(model, model, batch(length)))
        graphs.append(count.frame_count)
    assert len(set(graphs[known - 1 :])) == 1 and graphs[-1] <= 2, graphs


@quick("lora", "loramoe", "alora", "loki")
def test_the_second_length_teaches_that_lengths_change(method):
    lengths(method, dynamic=None, known=2)


@quick("alora")
def test_told_so_it_knows_at_the_first(method):
    lengths(method, dynamic=True, known=1)


def test_no_batch_size_is_compiled_for_alone():
    model = patched("alora")
    call, count = compiled(model)
    for sequences in (2, 3, 4, 6):
        inputs = {name: value.repeat(3, 1)[:sequences] for name, value in batch(7).items()}
        assert_same(step(call, model, inputs), step(model, model, inputs))
    assert count.frame_count == 2


@quick("lora", "loramoe", "alora", "loki")
def test_a_padded_batch_under_autocast(method):
    model = patched(method)
    call, _ = compiled(model)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    inputs = batch(9) | {"attention_mask": mask}
    inputs["labels"] = inputs["labels"].masked_fill(mask == 0, -100)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (step(each, model, inputs) for each in (model, call))
    assert_same(actual, expected, 1e-2)
    assert relative_error(expected["loss"], step(model, model, inputs)["loss"]) > 1e-6, "bfloat16 shows"


@quick("loramoe", "alora")
def test_gradient_checkpointing(method):
    model = patched(method, dropout=0.3)
    expected = step(model, model, batch(9))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()  # transformers' hook for reentrant checkpointing, which no graph can hold
    call, count = compiled(model)
    # ALoRA's decoder layers note for the time of their call what the sequences are.
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        assert_same(step(call, model, batch(9)), expected)
    assert count.frame_count == 1


@pytest.mark.parametrize("method", DROPPING)
def test_each_call_of_a_graph_draws_its_own_masks(method):
    model = patched(method, dropout=0.3)
    call, count = compiled(model)
    torch.manual_seed(5)
    first, second = (step(call, model, batch(9), None) for _ in range(2))
    torch.manual_seed(5)
    expected = [step(model, model, batch(9), None) for _ in range(2)]
    for actual, wanted in zip((first, second), expected, strict=True):
        assert_same(actual, wanted)
    assert all(relative_error(second[name], value) > 1e-4 for name, value in first.items())
    assert count.frame_count == 1


def test_the_balancing_constraint():
    config = LoRAMoEConfig(r=2, num_experts=4, balance_weight=0.1, **FEW)
    model = patch(patched("loramoe").unload(), config).train()
    call, _ = compiled(model)
    inputs = batch(9) | {"task_types": torch.tensor([0, 1])}
    expected = step(model, model, inputs)
    assert_same(step(call, model, inputs), expected)
    assert relative_error(expected["loss"], step(model, model, batch(9))["loss"]) > 1e-4, "the constraint shows"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_inductor(method):
    lengths(method, dynamic=None, known=2, backend="inductor")
