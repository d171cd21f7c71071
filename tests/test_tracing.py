"""torch.jit.trace, torch.export and ONNX of patched models: graphs of PyTorch's own operations, for other inputs."""

import warnings

import pytest
import torch
from published_layers import LoKILinear
from torch import nn
from torch.export import Dim
from toy_transforms import ALONE, METHODS, TARGETS, config, ids, llama, net

from gci_kernels import LoKIConfig, patch, report
from gci_kernels.accuracy import relative_error
from gci_kernels.tuners import frozen, mixed

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning"),
]
SLOW = ("lora", "loki*")  # seconds each, and the quick ones have all that they have
SIZES = {0: Dim("batch", min=1, max=64), 1: Dim("time", min=2, max=128)}


class Logits(nn.Module):
    """The model as a function of tensors alone."""

    def __init__(self, model: nn.Module, **options) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options).logits


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def batch(count: int, time: int, padded: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and their mask; the first sequence begins with padding."""
    mask = torch.ones(count, time, dtype=torch.long)
    mask[0, :padded] = 0
    return ids(count, time, seed=time), mask


def assert_follows(graph, model, *batches) -> None:
    """The graph gives what the model gives, wherever there is no padding."""
    for tokens, mask in batches:
        with torch.no_grad():
            expected = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
            found = graph(tokens, mask)
        assert relative_error(found[mask.bool()], expected[mask.bool()]) < 1e-5


def assert_plain(program: torch.export.ExportedProgram) -> None:
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called and all(name.startswith("aten.") for name in called if not name.startswith("<built-in")), called


@pytest.mark.parametrize("grad", (False, True))
@pytest.mark.parametrize("count", (3, 40, 70))  # a decoding step, and either side of where plans change
@pytest.mark.parametrize("method", ALONE)
def test_trace_of_a_layer(method, count, grad):
    model = net(method, torch.float32)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (rows(count),), check_trace=False)
        for other in (rows(count, seed=1), rows(5, seed=2), rows(90, seed=3)):
            assert relative_error(traced(other), model(other)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_trace_of_a_language_model(method):
    """Traced without padding, and right with it, and at another length."""
    model = llama(method)
    with torch.no_grad():
        traced = torch.jit.trace(Logits(model, use_cache=False), batch(1, 6), check_trace=False)
    assert_follows(traced, model, batch(1, 6), batch(1, 6, padded=2), batch(3, 11, padded=4))


@pytest.mark.parametrize("method", ("lora", "loramoe"))
def test_trace_in_training_drops_anew(method):
    model = net(method, torch.float32, dropout=0.5).train()
    traced = torch.jit.trace(model, (rows(3),), check_trace=False)
    assert not torch.equal(traced(rows(3)), traced(rows(3)))


@pytest.mark.parametrize(("count", "strict"), ((3, True), (70, False)))
@pytest.mark.parametrize("method", ALONE)
def test_export_of_a_layer(method, count, strict):
    """For any number of rows, whichever it was exported with."""
    model = net(method, torch.float32)
    program = torch.export.export(
        model.base_model.model, (rows(count),), dynamic_shapes={"x": {0: Dim("rows", min=1, max=512)}}, strict=strict
    )
    assert_plain(program)
    for other in (rows(1), rows(16, seed=1), rows(63, seed=2), rows(200, seed=3)):
        assert relative_error(program.module()(other), model(other)) < 1e-5


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.slow if m in SLOW else ()) for m in METHODS])
def test_export_of_a_language_model(method):
    """With use_cache left on: the graph makes a cache, in which nothing of ours is kept."""
    model = llama(method)
    with torch.no_grad():
        program = torch.export.export(
            Logits(model), batch(2, 6), dynamic_shapes={"input_ids": SIZES, "attention_mask": SIZES}, strict=False
        )
    assert_plain(program)
    assert_follows(program.module(), model, batch(2, 6), batch(1, 9, padded=3), batch(3, 40, padded=5))
    with torch.no_grad():  # the model itself is as it was, its decoding steps too
        tokens = ids(1, 5)
        assert relative_error(model(tokens).logits, llama(method)(tokens).logits) < 1e-6


@pytest.mark.parametrize("capture", ("jit", "export"))
def test_a_cache_given_to_a_graph_is_refused_for_attention(capture):
    """Keys and values of the adapters would be constants of the graph."""
    model = llama("alora")
    with torch.no_grad():
        cache = model(input_ids=ids(1, 4)).past_key_values

        class Step(nn.Module):
            def forward(self, tokens):
                return model(input_ids=tokens, past_key_values=cache).logits

        with pytest.raises(Exception, match="make the graph of a forward with use_cache=False"):
            if capture == "jit":
                torch.jit.trace(Step(), (ids(1, 1),))
            else:
                torch.export.export(Step(), (ids(1, 1),), strict=False)


@pytest.mark.parametrize("method", ("lora", "loramoe", "loki"))
def test_mixed_batch(method):
    """adapter_names are the graph's constants; the indices that serve eager calls are no tensors of the graph."""
    model = llama(method)
    torch.manual_seed(2)
    model.add_adapter("other", config(method, TARGETS, [[2, 7], [4, 6]]))
    patch(model).eval()
    mixed._cached_indices.cache_clear()
    names = ["default", "other", "__base__"]
    with torch.no_grad():
        program = torch.export.export(Logits(model, adapter_names=names, use_cache=False), batch(3, 6), strict=False)
        assert_plain(program)
        tokens, mask = batch(3, 6, padded=2)
        expected = model(input_ids=tokens, attention_mask=mask, adapter_names=names).logits
    assert relative_error(program.module()(tokens, mask)[mask.bool()], expected[mask.bool()]) < 1e-5


def test_two_active_adapters_of_loki():
    model = net("loki", torch.float32)
    model.add_adapter("other", LoKIConfig(positions={"fc": [0, 5]}, init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    x = rows(3)
    with pytest.raises(ValueError, match="run the model once before its graph is made"):
        torch.export.export(model.base_model.model, (x,))
    expected = model(x)
    program = torch.export.export(model.base_model.model, (x,))
    assert_plain(program)
    assert relative_error(program.module()(x), expected) < 1e-6


def test_hooks_and_a_base_layer_that_is_called():
    """Where the base layer runs itself, and the adapter is added."""
    model = net("lora", torch.float32)
    seen = []
    model.base_model.model.fc.base_layer.register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.no_grad():
        traced = torch.jit.trace(model, (rows(3),), check_trace=False)
        assert relative_error(traced(rows(4, seed=1)), model(rows(4, seed=1))) < 1e-6
    assert seen


def test_frozen_layers_through_float32():
    layers = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)).to(torch.float16).requires_grad_(False)
    x, other = rows(20).half(), rows(33, seed=1).half()
    expected = layers(other)
    frozen.swap_all(layers)
    assert type(layers[0]) is not nn.Linear
    program = torch.export.export(layers, (x,), dynamic_shapes={"input": {0: Dim("rows", min=1, max=64)}})
    assert_plain(program)
    for graph in (program.module(), torch.jit.trace(layers, (x,), check_trace=False)):
        assert torch.equal(graph(other), expected)


def test_layers_of_the_published_repository():
    model = nn.Sequential(LoKILinear(nn.Linear(8, 6), [1, 4]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("active" in name)
    x, other = rows(20), rows(33, seed=1)
    with torch.no_grad():
        model[0].active.weight.normal_()
        expected = model(other)
        patch(model)
        assert report(model)[0].plan == "rows=kept"
        program = torch.export.export(model, (x,), dynamic_shapes={"input": {0: Dim("rows", min=1, max=64)}})
        assert_plain(program)
        for graph in (program.module(), torch.jit.trace(model, (x,), check_trace=False)):
            assert relative_error(graph(other), expected) < 1e-6
    for impl in ("auto", "reference"):
        patch(model, impl=impl)
        assert report(model)[0].plan == ("rows=kept" if impl == "auto" else "rows=reference")
        assert relative_error(torch.func.vmap(model)(other), expected) < 1e-6
        (first,) = torch.autograd.grad(model(other).pow(2).sum(), model[0].active.weight, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), model[0].active.weight)
        assert relative_error(second, 2 * (other.T @ other).sum(0).expand_as(second)) < 1e-4
    with pytest.raises(ValueError, match="impl='triton' cannot run here"):
        patch(model, impl="triton")(x)
    assert report(model)[0].plan.startswith("raises: impl='triton' cannot run here")


def test_packed_sequences_of_attention():
    """Traced with one sequence in a row, and right for several."""
    model = llama("alora")

    class Packed(Logits):
        def forward(self, tokens, positions):
            return self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits

    one, two = torch.arange(7)[None], torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with torch.no_grad():
        traced = torch.jit.trace(Packed(model), (ids(1, 7), one), check_trace=False)
        program = torch.export.export(Packed(model), (ids(1, 7), one), strict=False).module()
        for positions in (one, two):
            expected = model(input_ids=ids(1, 7), position_ids=positions, use_cache=False).logits
            assert relative_error(traced(ids(1, 7), positions), expected) < 1e-5
            assert relative_error(program(ids(1, 7), positions), expected) < 1e-5


@pytest.mark.parametrize("method", ALONE)
def test_compiled_models_keep_our_operators(method):
    """torch.compile is no export: its graph runs here and now."""
    torch.compiler.reset()
    model, graphs = net(method, torch.float32), []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    x = rows(70)
    assert relative_error(torch.compile(model, backend=backend, fullgraph=True)(x), model(x)) < 1e-6
    assert [name for name in graphs[0] if "gci_kernels" in name]


@pytest.mark.parametrize("method", METHODS)
def test_onnx(method, tmp_path):
    """The graph holds operators of ONNX alone, and onnxruntime follows the model at other sizes."""
    import onnxruntime as runtime

    model, file = llama(method), tmp_path / "model.onnx"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Logits(model, use_cache=False), batch(2, 6), dynamo=True, verbose=False,
            dynamic_shapes={"input_ids": SIZES, "attention_mask": SIZES},
        )  # fmt: skip
    assert {node.domain for node in program.model.graph} == {""}
    program.save(file)
    session = runtime.InferenceSession(file)

    def graph(*inputs):
        given = zip(("input_ids", "attention_mask"), inputs, strict=True)
        return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in given})[0])

    assert_follows(graph, model, batch(2, 6), batch(3, 11, padded=4))
