"""accelerate's hooks on patched models: offloaded and dispatched layers compute what they would without."""

import copy
import functools

import accelerate
import pytest
import torch
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from peft import LoraConfig, PeftModel, get_peft_model
from toy_decoding import IDS, adapted, config, settings, tiny_llama

from gci_kernels import LoKIConfig, patch, report, unpatch
from gci_kernels.accuracy import relative_error
from gci_kernels.tuners import alora, bottleneck, hooks, loki, lora, loramoe
from gci_kernels.tuners.lora import FusedLora

pytestmark = pytest.mark.usefixtures("poisoned")

METHODS = ("lora", "loramoe", "alora", "loki", "loki*")
LONG = IDS.repeat(2, 4)  # too many tokens for a decoding step
CPU = torch.device("cpu")


def with_adapter(method):
    if method == "loki*":
        model = patch(tiny_llama(), LoKIConfig(positions=[[3, 9, 40], [7]], r=2, init_weights=False))
    else:
        model = adapted(method)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "loki_" in name:
            parameter.data.normal_()
    return model.eval()


def cpu_offload(model, folder):
    return accelerate.cpu_offload(model, execution_device=CPU)


def cpu_offload_with_buffers(model, folder):
    return accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)


def disk_offload(model, folder):
    return accelerate.disk_offload(model, folder, execution_device=CPU)


def dispatch(model, folder):
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def part_on_disk(model, folder):
    names = [name for name, module in model.named_modules() if name.endswith((".embed_tokens", ".norm", "lm_head"))]
    layers = [name for name, module in model.named_modules() if name.rpartition(".")[0].endswith("layers")]
    rotary = [name for name, module in model.named_modules() if name.endswith("model.rotary_emb")]
    where = dict.fromkeys(names + layers + rotary, "cpu") | {layers[0]: "disk"}
    return accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=folder)


OFFLOADS = (cpu_offload, cpu_offload_with_buffers, disk_offload, part_on_disk)
named = functools.partial(pytest.mark.parametrize, ids=lambda function: function.__name__)


def outputs(model):
    """Logits of a short and of a long input, and tokens."""
    with torch.no_grad():
        tokens = model.generate(**settings(IDS, max_new_tokens=4))
        return model(IDS).logits, model(LONG).logits, tokens


def assert_same(actual, wanted):
    assert relative_error(actual[0], wanted[0]) < 1e-5 and relative_error(actual[1], wanted[1]) < 1e-5
    assert torch.equal(actual[2], wanted[2])


@named("move", (*OFFLOADS, dispatch))
@pytest.mark.parametrize("method", METHODS)
def test_the_same_numbers_under_hooks(method, move, tmp_path):
    model = with_adapter(method)
    wanted = outputs(model)
    model = move(model, tmp_path)
    assert_same(outputs(model), wanted)
    assert_same(outputs(model), wanted)
    report(model)
    remove_hook_from_submodules(model)
    if move is dispatch:
        assert_same(outputs(model), wanted)
        assert {line.base for line in report(model)} == {"fused"}


@named("move", (*OFFLOADS, dispatch))
def test_lora_that_is_patched_under_hooks(move, tmp_path, monkeypatch):
    """Values of PEFT; fused where the hook does nothing to a layer, and the report says which."""
    model = unpatch_to_peft(with_adapter("lora"))
    wanted = outputs(model)
    patch(move(model, tmp_path))
    assert_same(outputs(model), wanted)
    fused, own = [], FusedLora._adapted
    monkeypatch.setattr(FusedLora, "_adapted", lambda self, *args: fused.append(self) or own(self, *args))
    with torch.no_grad():
        model(LONG)
    lines = report(model)
    assert len(fused) == sum(line.declined is None for line in lines)
    assert len(fused) == {dispatch: 6, part_on_disk: 3}.get(move, 0)
    assert {line.base == "fused" for line in lines if line.declined is None} <= {True}
    assert all("offloaded" in line.declined for line in lines if line.declined is not None)
    unpatch(model)
    assert_same(outputs(model), wanted)
    assert not any(isinstance(module, FusedLora) for module in model.modules())
    if move is dispatch:
        assert model.base_model.model.model.layers[0].mlp.gate_proj._old_forward.__func__ is not FusedLora.forward


def unpatch_to_peft(model):
    """A PeftModel with PEFT's own LoRA layers and the same weights."""
    plain = get_peft_model(tiny_llama(), config("lora"))
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def test_hooks_that_are_taken_away_leave_a_fused_layer():
    model = unpatch_to_peft(with_adapter("lora"))
    wanted = outputs(model)
    dispatch(model, None)
    remove_hook_from_submodules(model)
    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    assert "forward" in vars(layer)  # which accelerate leaves behind
    patch(model)
    assert {(line.declined, line.base) for line in report(model)} == {(None, "fused")}
    assert_same(outputs(model), wanted)
    assert layer.forward.__func__ is type(layer).forward and isinstance(layer, FusedLora)
    dispatch(model, None)
    unpatch(model)
    remove_hook_from_submodules(model)
    assert layer.forward.__func__ is type(layer).forward and not isinstance(layer, FusedLora)
    assert_same(outputs(model), wanted)


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


class Replacing(ModelHook):
    pass


@pytest.mark.parametrize("hook", (Doubling(), Replacing()), ids=("doubling", "unknown"))
@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_other_kinds_run(method, hook):
    model = with_adapter(method)
    layers = [module for module in model.modules() if hasattr(module, "base_layer")]
    for layer in layers:
        add_hook_to_module(layer.base_layer, hook)
    with torch.no_grad():
        actual = model(LONG).logits
        assert {type(hook).__name__ in line.base for line in report(model)} == {True}
        for layer in layers:
            remove_hook_from_submodules(layer)
            layer.base_layer.register_forward_hook(lambda module, args, y: hook.post_forward(module, y))
        assert relative_error(actual, model(LONG).logits) < 1e-5


def test_an_input_on_another_device_is_left_to_its_hook():
    layer = add_hook_to_module(torch.nn.Linear(4, 3), AlignDevicesHook(execution_device="cpu"))
    assert hooks.obstacle(layer) is None and hooks.obstacle(layer, torch.ones(2, 4)) is None
    assert hooks.obstacle(layer, torch.ones(2, 4, device="meta")) == "a hook of accelerate moves its input"


@pytest.mark.parametrize("kind", ("forward_pre", "forward", "full_backward_pre", "full_backward"))
@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_hook_of_torch_runs(method, kind):
    """A kernel that reads a layer's weight calls none of them."""
    model, fired = with_adapter(method), []
    model.enable_input_require_grads()
    layers = [module.base_layer for module in model.modules() if hasattr(module, "base_layer")]
    if method == "lora":
        layers += [module for name, module in model.named_modules() if "lora_A." in name]
    for layer in layers:
        getattr(layer, f"register_{kind}_hook")(lambda module, *_: fired.append(module))
    model(LONG).logits.sum().backward()
    assert set(fired) == set(layers) and len(fired) == len(layers)


@named("move", (cpu_offload, disk_offload, part_on_disk, dispatch))
@pytest.mark.parametrize("method", METHODS)
def test_an_offloaded_base_is_adapted(method, move, tmp_path):
    wanted = with_adapter(method)
    base = move(tiny_llama(), tmp_path)
    made = LoKIConfig(positions=[[3, 9, 40], [7]], r=2) if method == "loki*" else config(method)
    model = patch(base, made).eval()
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.device.type for p in adapters.values()} == {"cpu"} and all(p.isfinite().all() for p in adapters.values())
    if method == "loki":  # starts as the model's own rows
        plain = tiny_llama()
        with torch.no_grad():
            assert relative_error(model(LONG).logits, plain(LONG).logits) < 1e-5
    names = dict(wanted.named_parameters())
    for name, parameter in adapters.items():
        parameter.data.copy_(names[name])
    assert_same(outputs(model), outputs(wanted))
    for name in ("second", "default"):
        if method != "lora":
            model.add_adapter("second", copy.deepcopy(made)) if name == "second" else None
            assert {p.device.type for n, p in model.named_parameters() if p.requires_grad or ".second" in n} == {"cpu"}


def test_lora_whose_start_needs_the_weight_is_refused_on_an_offloaded_base():
    base = cpu_offload(tiny_llama(), None)
    with pytest.raises(ValueError, match="add the adapter before the hooks"):
        patch(base, LoraConfig(target_modules=["q_proj"], use_dora=True))


@pytest.mark.parametrize(
    ("method", "move"),
    # PEFT leaves a LoRA adapter that is loaded into an offloaded model on the meta device.
    [(m, f) for m in METHODS for f in (cpu_offload, disk_offload, dispatch) if m != "lora" or f is dispatch],
)
def test_saved_and_loaded_under_hooks(method, move, tmp_path):
    model = with_adapter(method)
    wanted = outputs(model)
    model.save_pretrained(tmp_path / "adapter")
    base = move(tiny_llama(), tmp_path / "weights")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    if method == "lora":
        patch(model)
    assert_same(outputs(model), wanted)


@named("move", (cpu_offload, disk_offload, dispatch))
@pytest.mark.parametrize("method", ("loki", "loki*"))
def test_merged_under_hooks(method, move, tmp_path):
    model = with_adapter(method)
    with torch.no_grad():
        with model.disable_adapter():
            plain = model(LONG).logits
        wanted = model(LONG).logits
        model = move(model, tmp_path)
        model.merge_adapter()
        assert relative_error(model(LONG).logits, wanted) < 1e-5
        model.unmerge_adapter()
        assert relative_error(model(LONG).logits, wanted) < 1e-5
        with model.disable_adapter():
            assert torch.equal(model(LONG).logits, plain)


@named("move", (cpu_offload, disk_offload, dispatch))
@pytest.mark.parametrize("method", ("loki", "loki*"))
def test_a_layer_merged_by_itself_under_hooks(method, move, tmp_path):
    """Where PEFT does not bring its weight."""
    model = with_adapter(method)
    with torch.no_grad():
        with model.disable_adapter():
            plain = model(LONG).logits
        wanted = model(LONG).logits
        model = move(model, tmp_path)
        layer = model.base_model.model.model.layers[0].mlp.down_proj
        layer.merge()
        assert layer.merged and relative_error(model(LONG).logits, wanted) < 1e-5
        with model.disable_adapter():
            assert torch.equal(model(LONG).logits, plain)
        assert not layer.merged and relative_error(model(LONG).logits, wanted) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_training_of_a_dispatched_model(method):
    model = with_adapter(method)

    def gradients():
        model.zero_grad()
        model(input_ids=LONG, labels=LONG).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    dispatch(model, None)
    actual = gradients()
    assert wanted.keys() == actual.keys() and all(relative_error(actual[n], wanted[n]) < 1e-5 for n in wanted)


@pytest.mark.parametrize("method", ("loramoe", "alora", "loki"))
def test_only_what_is_active_is_brought(method, monkeypatch):
    model = with_adapter(method)
    model.add_adapter("idle", copy.deepcopy(model.peft_config["default"]))
    model.eval()
    cpu_offload(model, None)
    brought, own = [], accelerate.hooks.set_module_tensor_to_device
    monkeypatch.setattr(
        accelerate.hooks, "set_module_tensor_to_device",
        lambda module, name, *args, **kwargs: brought.append(name) or own(module, name, *args, **kwargs),
    )  # fmt: skip
    with torch.no_grad():
        model(LONG)
    assert "default" in brought and "idle" not in brought


class Gathering(dict):
    """As DeepSpeed's ZeRO-3 keeps a module's parameters: whole only for who looks them up as items."""

    def __init__(self, parameters):
        super().__init__({name: None if p is None else torch.nn.Parameter(p[:0]) for name, p in parameters.items()})
        self.whole = parameters

    def __getitem__(self, name):
        super().__getitem__(name)
        return self.whole[name]


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_are_gathered_when_they_are_looked_up(method):
    model = with_adapter(method)
    wanted = outputs(model)
    for module in model.modules():
        module._parameters = Gathering(module._parameters)
    assert_same(outputs(model), wanted)


@pytest.fixture
def fused_on(monkeypatch):
    """The devices of the base weights that fused products read, one entry a call."""
    devices = []

    def counted(op, *args):
        weight = args[0][1] if isinstance(args[0], tuple) else args[1]
        devices.append(None if weight is None else weight.device.type)
        return op(*args)

    named = [(module, "adapted_linear") for module in (alora, bottleneck, lora, loramoe, loki)]
    for module, name in (*named, (loki, "adapted_row_linear")):
        monkeypatch.setattr(module, name, functools.partial(counted, getattr(module, name)))
    return devices


@pytest.mark.parametrize(
    ("method", "adapter_first"),
    # LoKI's rows and PEFT's adapters would have no values on the meta device.
    [("lora", True), ("loki", True), *((method, first) for method in ("loramoe", "alora") for first in (True, False))],
)
def test_a_model_on_two_devices_is_fused_on_both(method, adapter_first, fused_on):
    model = with_adapter(method) if adapter_first else tiny_llama()
    llama = model.get_base_model() if adapter_first else model
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
    where |= {"model.layers.1": "meta", "model.norm": "meta", "lm_head": "meta"}
    accelerate.dispatch_model(llama, where, main_device="cpu")
    model = model if adapter_first else patch(model, config(method)).eval()
    remove_hook_from_module(llama)  # which would bring the output back; there is no way from the meta device
    with torch.no_grad():
        assert model(LONG, use_cache=False).logits.device.type == "meta"
    each = 1 if method == "loki" else 3  # adapted layers in a decoder layer
    assert fused_on == ["cpu"] * each + ["meta"] * each


@pytest.mark.parametrize("grad", (True, False))
@pytest.mark.parametrize("method", ("lora", "loramoe", "loki", "loki*"))
def test_an_input_that_the_hook_has_to_move_is_moved_first(method, grad, fused_on):
    """As before a layer that begins a part of the device map; the adapter lies where the hook brings the input."""
    layer = with_adapter(method).base_model.model.model.layers[0].mlp.down_proj.to("meta")
    add_hook_to_module(layer.base_layer, AlignDevicesHook(execution_device="meta"))
    x = torch.randn(2, 20, layer.in_features, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        y = layer(x)
    assert y.device.type == "meta" and y.shape == (2, 20, layer.out_features) and y.requires_grad == grad
    assert fused_on == ["meta"]


def test_where_hooks_move_input_and_output():
    layer, x, meta = torch.nn.Linear(4, 3), torch.ones(2, 4), torch.device("meta")

    def devices(*made):
        layer._hf_hook = SequentialHook(*made)
        return hooks.devices(layer, x)

    def align(device, same=False):
        return AlignDevicesHook(execution_device=device, io_same_device=same)

    assert hooks.devices(torch.nn.Linear(4, 3), x) is None
    assert devices(align("cpu"), align("cpu", True), align(None), Doubling()) is None
    assert devices(align("meta")) == (meta, meta) == devices(align("meta"), align("meta", True))
    assert devices(align("meta", True)) == (meta, CPU) == devices(align("cpu", True), align("meta"))
