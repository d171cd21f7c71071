"""patch, unpatch and report: PEFT's LoRA keeps its meaning, and a model is either patched or exactly as it was."""

import copy
import importlib
import pickle

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import gci_kernels
from gci_kernels import LoRAMoEConfig, patch, report, unpatch
from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.tuners import FusedLoraLinear, LoRAMoELinear
from gci_kernels.tuners.lora import FusedLoraTuner

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = ["gate_proj", "down_proj", "q_proj"]
IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 77], [1, 1, 1, 62, 8, 30, 21], [1, 44, 2, 96, 55, 13, 70]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])

# What a LoRA may be made of; every one of these runs fused.
FUSED_LORA = {
    "plain": {},
    "bias='lora_only'": {"bias": "lora_only"},
    "bias='all'": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.fixture
def fused_calls(monkeypatch) -> list[dict]:
    """The keyword arguments of every call of the fused op by a patched layer."""
    module = importlib.import_module("gci_kernels.tuners.lora")
    calls, original = [], module.adapted_linear

    def spy(*args):
        calls.append(dict(zip(("operands", "mixer", "numbers", "scaling", "dropout_p", "impl"), args, strict=True)))
        return original(*args)

    monkeypatch.setattr(module, "adapted_linear", spy)
    return calls


def tiny_llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    """The same model at every call, with biases in its linear layers, in evaluation mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=1, initializer_range=0.2,
        attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


def lora_config(**overrides) -> LoraConfig:
    """LoRA with an effect (B is random)."""
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False, **overrides})


def with_lora(config: LoraConfig | None = None, dtype: torch.dtype = torch.float64) -> PeftModel:
    """A tiny Llama with PEFT's LoRA, in evaluation mode; the same at every call with an equal config."""
    model = tiny_llama(dtype)
    torch.manual_seed(1)
    return get_peft_model(model, config or lora_config()).eval()


def with_two_adapters(**other) -> PeftModel:
    """Adapter "default", and "other" of another rank, scaling and targets; "default" is active."""
    model = with_lora()
    other = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], **other}
    model.add_adapter("other", lora_config(**other))
    return model.eval()


def patched_and_not(model: PeftModel) -> tuple[PeftModel, PeftModel]:
    """A patched copy, and the model itself."""
    return patch(copy.deepcopy(model)), model


def run(model: nn.Module, *, backward: bool = True, **kwargs) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """The logits, and the gradients of all parameters and of the input; dropout draws from the same seed."""
    torch.manual_seed(2)
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        logits = model(inputs_embeds=embedded, attention_mask=MASK, **kwargs).logits
    if not backward:
        return logits, {}
    model.zero_grad()
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits.detach(), {**gradients, "inputs_embeds": embedded.grad}


def assert_same(actual: nn.Module, expected: nn.Module, tolerance: float = 1e-10, **kwargs) -> None:
    """Equal logits and gradients; a parameter without a gradient has none in both."""
    (actual_logits, actual_gradients), (logits, gradients) = run(actual, **kwargs), run(expected, **kwargs)
    assert relative_error(actual_logits, logits) <= tolerance
    assert actual_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (actual_gradients[name] is None) == (gradient is None), name
        if gradient is not None:
            assert relative_error(actual_gradients[name], gradient) <= tolerance, name


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (lora.LoraLayer, LoRAMoELinear))}


def logits(model: nn.Module) -> torch.Tensor:
    return run(model, backward=False)[0]


class Fingerprint:
    """All that makes up a model: modules, their classes and attributes, parameters and their values, hooks, configs.

    Objects count by identity; they are kept alive here, so that an address cannot be used twice.
    """

    def __init__(self, model: nn.Module) -> None:
        self._alive: list = []
        self.modules = {
            name: (id(module), type(module), {key: self._mark(value) for key, value in vars(module).items()})
            for name, module in model.named_modules(remove_duplicate=False)
        }
        self.values = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
        self.flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.configs = [getattr(model, name).to_dict() for name in ("config", "generation_config")]

    def _mark(self, value):
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        self._alive.append(value)
        if isinstance(value, dict):
            return [(self._mark(key), self._mark(each)) for key, each in value.items()]
        if isinstance(value, (list, tuple)):
            return [self._mark(each) for each in value]
        if isinstance(value, (set, frozenset)):
            return {id(each) if not isinstance(each, str) else each for each in value}
        return id(value)

    def assert_equal(self, other: "Fingerprint") -> None:
        assert self.modules.keys() == other.modules.keys()
        for name, (identity, cls, attributes) in self.modules.items():
            assert other.modules[name][:2] == (identity, cls), name
            assert other.modules[name][2] == attributes, name
        assert self.flags == other.flags
        assert self.configs == other.configs
        assert self.values.keys() == other.values.keys()
        assert all(torch.equal(value, other.values[name]) for name, value in self.values.items())


# PEFT's LoRA, layer for layer


@pytest.mark.smoke
@pytest.mark.parametrize("kind", FUSED_LORA)
def test_output_and_gradients_are_those_of_peft(kind, fused_calls):
    patched, peft = patched_and_not(with_lora(lora_config(**FUSED_LORA[kind])))
    training = kind != "dropout"  # random in training: it has tests of its own
    assert_same(patched.train(training), peft.train(training))
    assert len(fused_calls) == len(adapted_layers(patched)) == 6


def test_conv1d_base(fused_calls):
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=97, n_positions=16)).double()
    config = lora_config(target_modules=["c_fc", "c_attn"], fan_in_fan_out=True)
    patched, peft = patched_and_not(get_peft_model(plain, config).eval())
    assert_same(patched, peft)
    assert len(fused_calls) == 4


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "autocast"),
    [
        (torch.float32, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float32, torch.float32, True),
    ],
)
def test_error_is_at_most_twice_that_of_peft(dtype, adapter_dtype, autocast, fused_calls):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(72, 88)), lora_config(target_modules=["0"], lora_bias=True))
    layer = model.base_model.model[0]
    layer.base_layer.to(dtype)
    layer.lora_A.to(adapter_dtype)
    layer.lora_B.to(adapter_dtype)
    working = torch.bfloat16 if autocast else dtype
    x, dout = torch.randn(2, 65, 72).to(dtype), torch.randn(2, 65, 88).to(working)

    def results(model: nn.Module, x: torch.Tensor, dout: torch.Tensor, autocast: bool = autocast) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = model(x)
        y.backward(dout)
        return [y, x.grad, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]

    exact = results(copy.deepcopy(model).double(), x.double(), dout.double(), autocast=False)
    plain = results(copy.deepcopy(model), x, dout)
    fused = results(patch(model), x, dout)
    assert len(exact) == 5 and len(fused_calls) == 1
    for ours, theirs, true in zip(fused, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, true) <= error_bound(relative_error(theirs, true), working)


@pytest.fixture
def dropout_layer() -> lora.Linear:
    """A patched layer of 64 features in training whose output is dropout(x), p = 0.25."""
    config = lora_config(r=64, lora_alpha=64, lora_dropout=0.25, target_modules=["0"])
    layer = patch(get_peft_model(nn.Sequential(nn.Linear(64, 64, bias=False)), config)).base_model.model[0]
    nn.init.zeros_(layer.base_layer.weight)
    nn.init.eye_(layer.lora_A["default"].weight)
    nn.init.eye_(layer.lora_B["default"].weight)
    return layer.train()


def test_dropout_drops_with_its_probability_and_the_same_in_backward(dropout_layer, fused_calls):
    x = torch.ones(500, 64, requires_grad=True)
    y = dropout_layer(x)
    y.sum().backward()
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.75))
    # 32,000 draws: five standard deviations are 0.012; neither rows nor columns repeat one another
    assert abs(kept.float().mean() - 0.75) < 0.012
    assert len(kept.unique(dim=0)) == 500 and len(kept.unique(dim=1)[0]) == 64
    torch.testing.assert_close(x.grad, y.detach())
    torch.testing.assert_close(dropout_layer.lora_A["default"].weight.grad, y.detach().sum(0).expand(64, 64))
    assert fused_calls[0]["dropout_p"] == 0.25


def test_dropout_follows_the_seed_of_torch(dropout_layer):
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return dropout_layer(torch.ones(4, 64))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    torch.manual_seed(0)
    assert not torch.equal(dropout_layer(torch.ones(4, 64)), dropout_layer(torch.ones(4, 64)))


def test_dropout_follows_the_mode_of_its_own_module(dropout_layer):
    dropout_layer.lora_dropout.eval()
    torch.testing.assert_close(dropout_layer(torch.ones(4, 64)), torch.ones(4, 64))


# Several adapters, merged, disabled, mixed


@pytest.mark.parametrize("names", [["default"], ["other"], ["default", "other"], ["other", "default"]], ids="+".join)
def test_active_adapters(names, fused_calls):
    patched, peft = patched_and_not(with_two_adapters(lora_bias=True))
    for model in (patched, peft):
        model.base_model.set_adapter(names)
    assert_same(patched, peft)
    assert len(fused_calls) == 2 * sum({"default": 3, "other": 2}[name] for name in names)


def test_scaling_follows_peft():
    patched, peft = patched_and_not(with_lora())
    before = logits(patched)
    for model in (patched, peft):
        for layer in adapted_layers(model).values():
            layer.set_scale("default", 0.5)
    assert_same(patched, peft)
    assert relative_error(logits(patched), before) > 1e-3


@pytest.mark.parametrize("patch_first", [True, False])
def test_merged_then_unmerged(patch_first, fused_calls):
    patched, peft = with_lora(), with_lora()
    if patch_first:
        patch(patched)
    patched.merge_adapter()
    if not patch_first:
        patch(patched)
    peft.merge_adapter()
    assert torch.equal(logits(patched), logits(peft))
    assert not fused_calls
    assert all(row.plan.endswith("merged)") for row in report(patched))
    for model in (patched, peft):
        model.unmerge_adapter()
    assert_same(patched, peft)
    assert len(fused_calls) == 6
    assert_same(patched, with_lora())


@pytest.mark.smoke
def test_merge_and_unload():
    patched, peft = patched_and_not(with_lora())
    merged = [model.merge_and_unload() for model in (patched, peft)]
    assert not adapted_layers(merged[0])
    assert torch.equal(*map(logits, merged))


def test_disabled_adapters_give_the_base_model_exactly(fused_calls):
    patched, peft = patched_and_not(with_lora())
    with patched.disable_adapter():
        assert torch.equal(logits(patched), logits(tiny_llama()))
        assert not fused_calls
        assert all("disabled" in row.plan for row in report(patched))
    assert_same(patched, peft)


def test_patch_while_disabled(fused_calls):
    patched, peft = with_lora(), with_lora()
    with patched.disable_adapter():
        patch(patched)
        assert torch.equal(logits(patched), logits(tiny_llama()))
    assert_same(patched, peft)
    assert len(fused_calls) == 6


def test_mixed_batch():
    patched, peft = patched_and_not(with_two_adapters())
    names = ["default", "__base__", "other"]
    assert_same(patched, peft, adapter_names=names)
    assert relative_error(run(patched, adapter_names=names)[0], logits(patched)) > 1e-2


def test_modules_of_an_adapter_added_later(fused_calls):
    patched, peft = patch(with_lora()), with_two_adapters()
    torch.manual_seed(3)
    patched.add_adapter("other", copy.deepcopy(peft.peft_config["other"]))
    theirs = peft.state_dict()
    assert patched.state_dict().keys() == theirs.keys()
    patched.load_state_dict(theirs)
    patched.eval()
    for model in (patched, peft):
        model.base_model.set_adapter(["default", "other"])
    assert_same(patched, peft)
    new = {row.name: row for row in report(patched) if "up_proj" in row.name}
    assert len(new) == 2 and all("not patched" in row.declined for row in new.values())
    assert len(fused_calls) == 8
    patch(patched)
    assert_same(patched, peft)
    assert len(fused_calls) == 8 + 10
    assert not any(row.declined for row in report(patched))


@pytest.mark.parametrize("adapter_names", [None, ["default", "other", "__base__"]], ids=["active", "mixed"])
def test_generates_the_same_tokens_as_peft(adapter_names):
    patched, peft = patched_and_not(with_two_adapters().float())
    settings = {"attention_mask": MASK, "max_new_tokens": 10, "do_sample": False}
    if adapter_names is not None:
        settings["adapter_names"] = adapter_names
    tokens = [model.generate(input_ids=IDS, **settings) for model in (patched, peft)]
    assert tokens[0].shape == (3, 17)
    assert torch.equal(tokens[0], tokens[1])


def test_hooks_keep_firing(fused_calls):
    patched, peft = patched_and_not(with_lora())
    fired = []
    for model in (patched, peft):
        layer = model.base_model.model.model.layers[0].mlp.gate_proj
        layer.base_layer.register_forward_hook(lambda module, args, output: fired.append("base") or 2 * output)
        layer.register_forward_pre_hook(lambda module, args: fired.append("layer"))
        layer = model.base_model.model.model.layers[1].mlp.gate_proj
        layer.lora_A["default"].register_forward_hook(lambda module, args, output: fired.append("A") or 3 * output)
    assert_same(patched, peft)
    assert fired == 2 * ["layer", "base", "A"]
    assert len(fused_calls) == 5
    (declined,) = (row for row in report(patched) if row.declined)
    assert declined.name.endswith("layers.1.mlp.gate_proj") and "hooks" in declined.declined


def test_forward_replaced_on_a_base_layer_is_called():
    patched, peft = patched_and_not(with_lora())
    for model in (patched, peft):
        base_layer = model.base_model.model.model.layers[0].mlp.gate_proj.base_layer
        base_layer.forward = lambda x, own=base_layer.forward: 2 * own(x)  # as accelerate does to move weights
    assert_same(patched, peft)
    assert relative_error(logits(patched), logits(with_lora())) > 1e-2


# DoRA


def test_dora_alone_is_refused():
    model = with_lora(lora_config(use_dora=True))
    before, expected = Fingerprint(model), logits(model)
    with pytest.raises(ValueError, match="nothing to patch.*Dora"):
        patch(model)
    before.assert_equal(Fingerprint(model))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("active", ["default", "other"])
def test_dora_beside_lora(active, fused_calls):
    model = with_two_adapters(use_dora=True, target_modules=TARGETS)
    model.base_model.set_adapter(active)
    patched, peft = patched_and_not(model)
    for names, calls in ((["other"], 0), (["default", "other"], 0), (["default"], 6)):
        for model in (patched, peft):
            model.base_model.set_adapter(names)
        assert_same(patched, peft)
        assert len(fused_calls) == calls
        reasons = [row.declined for row in report(patched)]
        if calls:
            assert reasons == 6 * [None]
        else:
            assert all("adapter 'other' uses DoraLinearVariant" in reason for reason in reasons)


# What patch and unpatch leave alone


def test_patch_and_unpatch_leave_everything_else():
    model = with_two_adapters(use_rslora=True).train()
    model.base_model.model.lm_head.eval()
    hooked = model.base_model.model.model.layers[0].mlp.gate_proj
    hooked.register_forward_hook(lambda *_: None)
    before = Fingerprint(model)
    assert patch(model) is model

    patched = Fingerprint(model)
    for name, (identity, cls, attributes) in before.modules.items():
        now = {lora.Linear: FusedLoraLinear, lora.LoraModel: FusedLoraTuner}.get(cls, cls)
        assert patched.modules[name] == (identity, now, attributes), name
    assert FusedLoraLinear in {type(module) for module in model.modules()}
    assert list(patched.values) == list(before.values) and patched.flags == before.flags

    assert unpatch(model) is model
    before.assert_equal(Fingerprint(model))


def test_unpatch_keeps_trained_values():
    model = patch(with_lora())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    trained = logits(model)
    assert relative_error(logits(unpatch(model)), trained) < 1e-10
    assert relative_error(trained, logits(with_lora())) > 1e-4


def test_patching_twice_changes_nothing():
    model = patch(with_lora())
    before = Fingerprint(model)
    assert patch(model) is model
    before.assert_equal(Fingerprint(model))


def test_patching_twice_while_dora_is_active_changes_nothing():
    model = patch(with_two_adapters(use_dora=True, target_modules=TARGETS))
    model.base_model.set_adapter("other")
    before = Fingerprint(model)
    patch(model)
    before.assert_equal(Fingerprint(model))


def test_patching_a_loramoe_model_again_changes_nothing():
    model = patch(tiny_llama(), LoRAMoEConfig())
    before = Fingerprint(model)
    assert patch(model) is model
    before.assert_equal(Fingerprint(model))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_patched_model(duplicate, fused_calls):
    model = patch(with_lora())
    twin = duplicate(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert_same(twin, model, tolerance=0)
    assert len(fused_calls) == 12
    unpatch(twin)
    assert_same(twin, with_lora())
    assert FusedLoraLinear in {type(module) for module in model.modules()}


def test_saved_adapter_is_that_of_peft(tmp_path):
    model = patch(with_lora())
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).eval(), with_lora(), tolerance=0)


# patch(model, config)


@pytest.mark.parametrize(
    ("config", "fused"),
    [(lora_config(), FusedLoraLinear), (LoRAMoEConfig(target_modules=TARGETS, init_weights=False), LoRAMoELinear)],
    ids=["LoRA", "LoRAMoE"],
)
def test_patch_with_config_adds_the_adapter_and_unpatch_takes_it_away(config, fused):
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    before = Fingerprint(model)

    patched = patch(model, config, adapter_name="mine")
    assert isinstance(patched, PeftModel) and patched.get_base_model() is model
    assert list(patched.peft_config) == ["mine"]
    layers = adapted_layers(model)
    assert len(layers) == 6 and {type(layer) for layer in layers.values()} == {fused}
    assert all("mine" in name for name, parameter in patched.named_parameters() if parameter.requires_grad)
    assert relative_error(logits(patched), logits(tiny_llama())) > 1e-2
    patched(input_ids=IDS, labels=IDS).loss.backward()

    assert unpatch(patched) is model
    before.assert_equal(Fingerprint(model))
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_patch_leaves_the_config_alone():
    config = LoRAMoEConfig()
    patched = patch(tiny_llama(), config)
    assert config == LoRAMoEConfig() != patched.peft_config["default"]


def test_patch_with_lora_config_equals_peft():
    model = tiny_llama()
    torch.manual_seed(1)
    assert_same(patch(model, lora_config()).eval(), with_lora())


@pytest.mark.parametrize("kind", [lora_config, LoRAMoEConfig])
def test_unpatch_gives_back_modules_that_were_saved_whole(kind):
    model = tiny_llama()
    before = Fingerprint(model)
    patched = patch(model, kind(target_modules=TARGETS, modules_to_save=["lm_head"]))
    nn.init.zeros_(model.lm_head.modules_to_save["default"].weight)
    before.assert_equal(Fingerprint(unpatch(patched)))


@pytest.mark.parametrize("config", [lora_config(), LoRAMoEConfig()], ids=["LoRA", "LoRAMoE"])
def test_unpatch_under_gradient_checkpointing(config):
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    hooks = list(model.get_input_embeddings()._forward_hooks.values())
    unpatch(patch(model, config))
    assert list(model.get_input_embeddings()._forward_hooks.values()) == hooks


@pytest.mark.parametrize("make", [tiny_llama, with_lora], ids=["plain", "PEFT"])
def test_unpatch_needs_a_patched_model(make):
    with pytest.raises(ValueError, match="nothing to unpatch"):
        unpatch(make())


# All or nothing


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (LoRAMoEConfig(target_modules=["gate_proj", "norm"]), TypeError, "target_modules: model.norm is a LlamaRMS"),
        (LoRAMoEConfig(target_modules=["embed_tokens", "up_proj"]), TypeError, "target_modules.*Embedding"),
        (lora_config(target_modules=["gate_proj", "norm"]), ValueError, "LlamaRMSNorm"),
        (LoRAMoEConfig(target_modules=["gate_proj", "fc"]), ValueError, r"target_modules.*\['fc'\].*'gate_proj'"),
        (lora_config(target_modules=["c_attn", "fc"]), ValueError, r"target_modules.*\['c_attn', 'fc'\].*'q_proj'"),
        (LoRAMoEConfig(target_modules="nothing.*"), ValueError, "(?i)target.modules"),
        (lora_config(use_dora=True), ValueError, "Dora"),
        (lora_config(modules_to_save=["lm_head"], use_dora=True), ValueError, "Dora"),
        (IA3Config(target_modules=["up_proj"], feedforward_modules=[]), TypeError, "^config must be .*got IA3Config"),
        ({"r": 4}, TypeError, "^config must be a LoRAMoEConfig, ALoRAConfig, LoKIConfig or peft.LoraConfig, got dict"),
    ],
    ids=["norm", "embedding", "lora-norm", "name", "names", "pattern", "dora", "dora-save", "method", "dict"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_failed_patch_leaves_the_model_as_it_was(config, error, message, checkpointing):
    model = tiny_llama()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.lm_head.requires_grad_(False)
    model.model.norm.register_forward_hook(lambda *_: None)
    before, expected = Fingerprint(model), logits(model)
    with pytest.raises(error, match=message):
        patch(model, config)
    before.assert_equal(Fingerprint(model))
    assert torch.equal(logits(model), expected)
    assert relative_error(logits(patch(model, lora_config())), expected) > 1e-2


@pytest.mark.parametrize("interrupt", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("config", "layer"),
    [(lora_config(), lora.Linear), (LoRAMoEConfig(target_modules=TARGETS), LoRAMoELinear)],
    ids=["LoRA", "LoRAMoE"],
)
def test_patch_interrupted_in_the_third_layer(config, layer, interrupt, monkeypatch):
    made, original = [], layer.update_layer

    def update_layer(self, *args, **kwargs):
        made.append(self)
        if len(made) == 3:
            raise interrupt("third layer")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(layer, "update_layer", update_layer)
    model = tiny_llama()
    before = Fingerprint(model)
    with pytest.raises(interrupt, match="third layer"):
        patch(model, config)
    assert len(made) == 3
    before.assert_equal(Fingerprint(model))


def test_fusing_interrupted_in_the_third_layer(monkeypatch):
    module = importlib.import_module("gci_kernels.patching.patch")
    model = with_lora()
    before, original = Fingerprint(model), module.is_plain_lora

    def is_plain_lora(layer):
        if sum(type(each) is FusedLoraLinear for each in model.modules()) == 3:
            raise RuntimeError("third layer")
        return original(layer)

    monkeypatch.setattr(module, "is_plain_lora", is_plain_lora)
    with pytest.raises(RuntimeError, match="third layer"):
        patch(model)
    before.assert_equal(Fingerprint(model))


def test_handles_still_remove_their_hooks_after_a_failed_patch():
    model = tiny_llama()
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="Dora"):
        patch(model, lora_config(use_dora=True))
    handle.remove()
    assert not model.model.norm._forward_hooks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_llama, "nothing to patch: looked for linear layers of peft.*no adapter layers at all.*config"),
        (lambda: nn.Linear(2, 2), "nothing to patch"),
        (
            lambda: get_peft_model(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
            "nothing to patch.*q_proj: ia3.layer.Linear has no fused form",
        ),
    ],
    ids=["plain", "linear", "IA3"],
)
def test_nothing_to_patch(make, message):
    model = make()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        patch(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("model", ["SmolLM2", None, LlamaForCausalLM], ids=["path", "None", "class"])
def test_model_must_be_a_module(model):
    with pytest.raises(TypeError, match="^model must be a torch.nn.Module, got"):
        patch(model)


def test_config_for_a_model_that_has_adapters():
    model = with_lora()
    before = Fingerprint(model)
    with pytest.raises(ValueError, match="PeftModel already.*add_adapter"):
        patch(model, lora_config())
    before.assert_equal(Fingerprint(model))


# report


def test_report_of_loramoe():
    model = patch(tiny_llama(torch.float32), LoRAMoEConfig(r=4, num_experts=8))
    rows = report(model)
    assert [row.name for row in rows] == list(adapted_layers(model))
    kinds = {(row.method, row.dtype, row.base, row.declined) for row in rows}
    assert kinds == {("LoRAMoE 8x4", "float32", "fused", None)}
    assert {row.name.rpartition(".")[2]: row.shape for row in rows} == {
        "gate_proj": "64 -> 96",
        "up_proj": "64 -> 96",
        "down_proj": "96 -> 64",
    }
    plan = str(gci_kernels.ops.bottleneck.choose_plan("auto", 2048, torch.float32, "cpu", "gate"))
    assert {row.plan for row in rows} == {plan}


def test_report_of_lora():
    model = with_two_adapters()
    assert {row.declined for row in report(model)} == {"not patched: call gci_kernels.patch(model)"}
    assert {row.plan for row in report(model)} == {None}
    rows = {row.name: row for row in report(patch(model))}
    assert rows.keys() == adapted_layers(model).keys()
    assert all((row.plan is None) != (row.declined is None) and row.dtype == "float64" for row in rows.values())
    assert {name.rpartition(".")[2]: row.method for name, row in rows.items()} == {
        "gate_proj": "LoRA r=4",
        "down_proj": "LoRA r=4",
        "q_proj": "LoRA r=4, r=3",
        "up_proj": "LoRA r=3",
    }


def test_report_says_why_the_base_layer_is_called():
    model = patch(with_lora())
    name, layer = next(iter(adapted_layers(model).items()))
    layer.base_layer.register_forward_hook(lambda *_: None)
    assert {row.name: row.base for row in report(model) if row.base != "fused"} == {name: "own call: it has hooks"}


def test_printed_report_has_one_row_for_equal_layers():
    model = with_two_adapters(use_dora=True)
    patch(model).base_model.set_adapter("other")
    printed = str(report(model))
    assert "layers.*.mlp.gate_proj x 2" in printed and "layers.*.self_attn.q_proj x 2" in printed
    assert "declined: adapter 'other' uses DoraLinearVariant" in printed
    assert "project=" in printed
    assert sum(" x 2" in line for line in printed.splitlines()) == 4


def test_report_of_a_model_without_adapters_is_empty():
    assert report(tiny_llama()) == []
