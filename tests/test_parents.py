"""Layers whose weight a module around them reads without calling them: found when a model is patched."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from gci_kernels import LoKIConfig, LoRAMoEConfig, patch, report, unpatch
from gci_kernels.models import parents
from gci_kernels.tuners import LoRAMoELinear

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ["lora", "loramoe", "loki"]
REASON = "can compute with its weight without calling it, and an adapter has no effect then"
X = torch.linspace(-1, 1, 2 * 6 * 16).view(2, 6, 16)


def config_of(method: str, name: str):
    if method == "lora":
        return LoraConfig(r=4, target_modules=[name.rpartition(".")[2]], init_lora_weights=False)
    if method == "loramoe":
        return LoRAMoEConfig(r=2, num_experts=4, target_modules=[name.rpartition(".")[2]], init_weights=False)
    return LoKIConfig(positions={name: [0, 3]}, init_weights=False)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.slow, self.parts = False, 1
        self.inner = nn.Sequential(nn.Linear(16, 16))


def helper(x, layer, scale=1):
    return F.linear(x, layer.weight) * scale


class Attribute(Base):
    def forward(self, x):
        return self.other(F.linear(x, self.fc.weight, self.fc.bias))


class Variable(Base):
    def forward(self, x):
        layer = self.fc
        weight = layer.weight
        return self.other(x @ weight.T)


class Inherited(Attribute):
    pass


class Super(Attribute):
    def forward(self, x):
        return super().forward(x + 1)


class Method(Base):
    def forward(self, x):
        return self.other(self.project(x, self.fc))

    def project(self, x, layer):
        return x if layer is None else x @ layer.weight.t()


class Function(Base):
    def forward(self, x):
        return self.other(helper(x, layer=self.fc))


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.other(F.linear(x, self.fc.weight) if x.dim() > 2 else x)


class Condition(Base):
    def __init__(self) -> None:
        super().__init__()
        self.slow, self.parts = True, 2

    def forward(self, x):
        if self.parts > 1 and self.slow:
            x = sum(F.linear(x[..., i::2], self.fc.weight[:, i::2]) for i in range(2))
        else:
            x = self.fc(x)
        return self.other(x)


class Training(Base):
    def forward(self, x):
        return self.other(F.linear(x, self.fc.weight.clamp(-1, 1)) if self.training else self.fc(x))


READING = [Attribute, Variable, Inherited, Super, Method, Function, Decorated, Condition, Training]


class ConditionFalse(Condition):
    def __init__(self) -> None:
        super().__init__()
        self.parts = 1


class Questions(Base):
    def forward(self, x):
        assert isinstance(self.fc.weight, torch.Tensor) and self.fc.weight.size(0) == 16
        x = x.to(device=self.fc.weight.device, dtype=self.fc.weight.dtype) + torch.zeros_like(self.fc.weight[0]).sum()
        return self.other(self.fc(x)) if self.fc.weight is not None else x

    def tie(self):
        self.other.weight = self.fc.weight


CALLING = [ConditionFalse, Questions]


@pytest.mark.parametrize("kind", READING)
def test_a_weight_that_is_read(kind):
    model = kind()
    assert parents.readers(model) == {"fc": f"the model ({kind.__name__})"}
    for method in ("loramoe", "loki"):
        with pytest.raises(ValueError, match=f"cannot adapt fc: .*{kind.__name__}.*{REASON}"):
            patch(model, config_of(method, "fc"))
        with pytest.raises(ValueError, match=f"cannot adapt fc: .*{REASON}"):
            get_peft_model(kind(), config_of(method, "fc"))
    with pytest.warns(UserWarning, match=f"LORA adapts fc: .*{REASON}"):
        patched = patch(model, config_of("lora", "fc"))
    (row,) = report(patched)
    assert row.plan is None and REASON in row.declined
    patch(model := kind(), config_of("loramoe", "other"))
    assert isinstance(model.other, LoRAMoELinear)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CALLING)
def test_a_weight_that_is_only_asked_about(kind, method):
    assert parents.readers(kind()) == {}
    model = kind()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patched = patch(model, config_of(method, "fc"))
    assert not torch.allclose(patched(X), kind()(X))
    assert report(patched)[0].declined is None


class Lists(Base):
    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = F.linear(x, layer.weight) + number
        return F.linear(self.fc(x), self.inner[0].weight)


class Comprehension(Base):
    def forward(self, x):
        x = sum(F.linear(x, layer.weight) for layer in self.layers)
        other, fc = getattr(self, "inner"), self.fc  # noqa: B009
        return F.linear(fc(x), other[0].weight)


@pytest.mark.parametrize("kind", [Lists, Comprehension])
def test_layers_in_lists(kind):
    assert set(parents.readers(kind())) == {"layers.0", "layers.1", "inner.0"}


SOURCELESS = """
class Sourceless(Base):
    def forward(self, x):
        x = x.to(self.other.weight.dtype)
        return self.other(self.product(x)) if isinstance(self.slow, bool) else x

    def product(self, x):
        return F.linear(x, self.fc.weight, self.fc.bias)
"""


def test_a_class_without_source():
    names = {"Base": Base, "F": F, "__name__": __name__}
    exec(SOURCELESS, names)
    assert set(parents.readers(names["Sourceless"]())) == {"fc"}


def test_a_forward_of_the_instance():
    def forward(self, x):
        return F.linear(x, self.fc.weight)

    model = ConditionFalse()
    model.forward = forward.__get__(model)
    assert set(parents.readers(model)) == {"fc"}


@pytest.mark.parametrize(
    ("config", "says", "left"),
    [
        (LoRAMoEConfig(target_modules="all-linear"), "leaves fc out: .*", {"fc"}),
        (LoraConfig(target_modules="all-linear"), "LORA adapts fc: .*", set()),  # as PEFT does
    ],
)
def test_all_linear_says_what_becomes_of_such_layers_once(config, says, left):
    with pytest.warns(UserWarning, match=says + REASON) as seen:
        patched = patch(Attribute(), config)
    assert sum(REASON in str(warning.message) for warning in seen) == 1
    adapted = {row.name.removeprefix("base_model.model.") for row in report(patched)}
    assert adapted == {"fc", "other", "layers.0", "layers.1", "inner.0"} - left


@pytest.mark.parametrize("excluded", [["other"], r"o.*er"])
def test_all_linear_keeps_what_is_excluded(excluded):
    with pytest.warns(UserWarning, match="leaves fc out"):
        patched = patch(Attribute(), LoRAMoEConfig(target_modules="all-linear", exclude_modules=excluded))
    assert {row.name.removeprefix("base_model.model.") for row in report(patched)} == {
        "layers.0",
        "layers.1",
        "inner.0",
    }


def test_an_adapter_of_all_linear_loads_without_a_word(tmp_path):
    with pytest.warns(UserWarning, match="leaves fc out"):
        patch(Attribute(), LoRAMoEConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without calling it")
        loaded = PeftModel.from_pretrained(Attribute(), tmp_path)
    assert len(report(loaded)) == 4


# torch's attention and encoder layers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn, self.fc = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.attn(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("method", ["loramoe", "loki"])
def test_out_proj_of_multihead_attention_is_refused(method):
    model = Attention()
    with pytest.raises(ValueError, match=rf"cannot adapt attn.out_proj: attn \(MultiheadAttention\) {REASON}"):
        patch(model, config_of(method, "attn.out_proj"))
    assert type(model.attn.out_proj).__name__ == "NonDynamicallyQuantizableLinear"


def test_lora_on_multihead_attention_stays_peft_s():
    config = LoraConfig(r=4, target_modules=["attn", "fc"], init_lora_weights=False)
    torch.manual_seed(1)
    expected = get_peft_model(Attention(), config)
    torch.manual_seed(1)
    patched = patch(Attention(), config)
    torch.testing.assert_close(patched(X), expected(X))
    rows = {row.name.removeprefix("base_model.model."): row.declined for row in report(patched)}
    assert rows["fc"] is None and "has no fused form" in rows["attn"]
    assert "merges it" in rows["attn.base_layer.out_proj"]
    with pytest.raises(ValueError, match="nothing to patch"):
        patch(Attention(), LoraConfig(target_modules=["attn"]))


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize(
    ("method", "through"),
    [(m, f) for m in METHODS for f in (patch, get_peft_model) if (m, f) != ("lora", get_peft_model)],  # PEFT's own
)
@pytest.mark.parametrize("layer", ["linear1", "linear2"])
def test_encoder_layers_call_what_is_adapted(method, layer, through):
    model = encoder()
    patched = through(model, config_of(method, f"layers.1.{layer}"))
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    for kwargs in ({}, {"src_key_padding_mask": mask}):
        trained = patched.train()(X, **kwargs).detach()
        with torch.no_grad():
            evaluated = patched.eval()(X, **kwargs)
            plain = encoder().eval()(X, **kwargs)
        keep = ~mask if kwargs else slice(None)
        torch.testing.assert_close(trained[keep], evaluated[keep])
        assert (evaluated[keep] - plain[keep]).abs().max() > 1e-3
    model = unpatch(patched) if through is patch else patched.unload()
    assert model.layers[1].activation_relu_or_gelu == 1 and model.use_nested_tensor


class Subclass(nn.TransformerEncoderLayer):
    def forward(self, src, **kwargs):
        return super().forward(src, **kwargs) + 1


@pytest.mark.parametrize("method", METHODS)
def test_subclasses_of_the_encoder_layer_too(method):
    torch.manual_seed(0)
    patched = patch(Subclass(16, 2, 24, dropout=0.0, batch_first=True), config_of(method, "linear1"))
    trained = patched.train()(X).detach()
    with torch.no_grad():
        torch.testing.assert_close(patched.eval()(X), trained)


def test_patched_peft_model_calls_what_is_adapted_until_it_is_unpatched():
    patched = patch(get_peft_model(encoder(), config_of("lora", "linear1")))
    layers = patched.base_model.model.layers
    assert [layer.activation_relu_or_gelu for layer in layers] == [0, 0]
    unpatch(patched)
    assert [layer.activation_relu_or_gelu for layer in layers] == [1, 1] and patched.base_model.model.use_nested_tensor


# Models of transformers


def made(name: str, **changes):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=1, pad_token_id=0)
    return cls(cls.config_class(**{**sizes, **changes})).eval()


MAMBA = {"state_size": 4}
MAMBA2 = {"state_size": 4, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1}
SIGLIP = dict(intermediate_size=48, num_attention_heads=2, image_size=16, patch_size=8)


@pytest.mark.parametrize(
    ("name", "changes", "read"),
    [
        ("MambaForCausalLM", MAMBA, {"out_proj", "x_proj", "dt_proj"}),
        ("FalconMambaForCausalLM", MAMBA, {"out_proj", "x_proj", "dt_proj"}),
        ("Mamba2ForCausalLM", MAMBA2, {"out_proj"}),
        ("SiglipVisionModel", SIGLIP, {"out_proj"}),
        ("BloomForCausalLM", {"n_head": 4, "slow_but_exact": True, "pretraining_tp": 2}, {"dense", "dense_4h_to_h"}),
        ("BloomForCausalLM", {"n_head": 4, "slow_but_exact": True}, set()),
        ("BloomForCausalLM", {"n_head": 4, "pretraining_tp": 2}, set()),
        ("LlamaForCausalLM", {"num_attention_heads": 4, "intermediate_size": 48}, set()),
        ("GPT2LMHeadModel", {"n_head": 4, "n_embd": 32, "n_layer": 1}, set()),
        ("T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}, set()),
    ],
)
def test_models_of_transformers(name, changes, read):
    model = made(name, **changes)
    assert {each.rpartition(".")[2] for each in parents.readers(model)} == read
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        patched = patch(model, LoRAMoEConfig(r=2, num_experts=4, target_modules="all-linear"))
    assert sum(REASON in str(warning.message) for warning in seen) == bool(read)
    assert not any(row.declined for row in report(patched))
