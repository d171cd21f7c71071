"""The records of mixers and methods: what registering asks for, and what every registered method keeps to."""

import dataclasses
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from toy_adapters import llama, logits, saver
from toy_methods import HydraLoRAConfig

import gci_kernels
from gci_kernels import BottleneckConfig, Method, Mixer, ops, patch
from gci_kernels.accuracy import relative_error
from gci_kernels.ops.bottleneck import register as register_mixer
from gci_kernels.ops.bottleneck.registry import MIXERS, STAGES
from gci_kernels.proof import verify
from gci_kernels.tuners import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")
every = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@dataclasses.dataclass
class PlainConfig(BottleneckConfig):
    """LoRA itself, as a method of ours: its mixer can be merged."""

    method: ClassVar[str] = "PlainLoRA"


def parameters(config, in_features: int, out_features: int) -> dict[str, Tensor]:
    return {"A": torch.randn(config.r, in_features), "B": torch.randn(out_features, config.r) * 0.1}


def record(config=PlainConfig, mixer=ops.bottleneck.mixers.IDENTITY, **changes) -> Method:
    fields = dict(parameters=parameters, describe=lambda c: f"r={c.r}", example=config(r=2, init_weights=False))
    return Method(config, mixer, **fields | changes)


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is forgotten behind it."""
    for each in (METHODS, MIXERS, STAGES):
        for name in {**each}.keys():
            monkeypatch.setitem(each, name, each[name])
    before = [dict(each) for each in (METHODS, MIXERS, STAGES)]
    yield
    for name in METHODS.keys() - before[0].keys():
        gci_kernels.unregister(name)
    for each, kept in zip((MIXERS, STAGES), before[1:], strict=True):
        for name in each.keys() - kept.keys():
            del each[name]


def config_of(name: str):
    return dataclasses.make_dataclass(
        f"{name}Config", [("method", ClassVar[str], name)], bases=(BottleneckConfig,), namespace={"method": name}
    )


def test_a_method_that_merges_gives_its_bits_back(registry):
    gci_kernels.register(record())
    model = patch(llama(), PlainConfig(r=4, init_weights=False, target_modules=["q_proj", "up_proj"])).eval()
    expected, plain = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    assert relative_error(logits(model), expected) < 1e-5
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(plain[name], p) for name, p in model.named_parameters())
    merged = model.merge_and_unload()
    assert (
        not any(isinstance(m, PeftModel) for m in merged.modules()) and relative_error(logits(merged), expected) < 1e-5
    )


def test_a_base_weight_that_is_changed_while_a_method_is_merged_keeps_the_change(registry):
    gci_kernels.register(record())
    config = PlainConfig(r=4, init_weights=False, target_modules=["0", "1"])
    model = patch(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)), config).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model(x)
    weights = [layer.base_layer.weight.data for layer in model.base_model.model]
    before = [weight.clone() for weight in weights]
    model.merge_adapter()
    assert relative_error(model(x), expected) < 1e-12
    weights[0][2] += 1.0
    model.unmerge_adapter()
    before[0][2] += 1.0
    torch.testing.assert_close(weights[0][2], before[0][2])
    before[0][2] = weights[0][2]
    assert all(map(torch.equal, weights, before))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(example=None), "method 'Made' needs an example, a small MadeConfig with an effect"),
        (dict(parameters=lambda c, i, o: {"A": torch.ones(2, i)}), "`parameters` must return A, B and at most one"),
        (
            dict(parameters=lambda c, i, o: {"A": torch.ones(2, i), "B": torch.ones(o, 3)}),
            r"`parameters` must return B \[6, 2\], got \[6, 3\]",
        ),
        (dict(config=BottleneckConfig, example=None), "a dataclass derived from BottleneckConfig with `method`"),
    ],
)
def test_a_record_that_is_not_whole(registry, changes: dict, says: str):
    with pytest.raises((TypeError, ValueError), match=says):
        gci_kernels.register(dataclasses.replace(record(config_of("Made")), **changes))
    assert "Made" not in METHODS


@pytest.mark.parametrize(
    ("mixer", "says"),
    [
        (Mixer("wide", lambda h, w, call: torch.cat((h, h), -1)), "its `columns` declares"),
        (Mixer("late", lambda h, w, call: h, output=ops.Output.CONSTANT), "declares output=Output.CONSTANT.*no output"),
        (Mixer("early", lambda h, w, call: (h, h)), "declares output=Output.NONE.*an output; make the two agree"),
    ],
)
def test_a_mixer_whose_outputs_are_not_what_it_declares(registry, mixer: Mixer, says: str):
    with pytest.raises(ValueError, match=says):
        gci_kernels.register(record(config_of("Other"), mixer))


def test_names_are_registered_once(registry):
    with pytest.raises(ValueError, match="a method 'LoRAMoE' is registered already, .*; give this one another name"):
        gci_kernels.register(METHODS["LoRAMoE"])
    with pytest.raises(ValueError, match="a mixer 'gate' is registered already"):
        register_mixer(Mixer("gate", lambda h, w, call: h))
    with pytest.raises(ValueError, match="no mixer 'gone' is registered; there are attention, gate"):
        ops.bottleneck.plan.find("gone")


def test_a_checkpoint_of_a_method_that_nobody_registered(tmp_path, monkeypatch):
    saved = saver(tmp_path)
    _, folder = saved("hydralora")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace("GCI_HYDRALORA", "GCI_CERBERUS"))
    with pytest.raises(KeyError, match="GCI_CERBERUS: import the module that registers it with gci_kernels first"):
        PeftModel.from_pretrained(llama(), folder)


@every
@pytest.mark.parametrize("dropout_p", (0.0, 0.25))
def test_gradients_are_those_of_the_formula(method: Method, dropout_p: float):
    """By numbers, and in every implementation that can run here."""
    case = verify.Case(method.name.lower(), 5, 7, 6, method.example.r, config=method.example, dropout_p=dropout_p)
    tensors = {name: t.requires_grad_() for name, t in verify.make_inputs(case, torch.float64, "cpu").items()}

    def call(*values: Tensor) -> Tensor:
        torch.manual_seed(3)
        return verify._outputs(case, dict(zip(tensors, values, strict=True)), "native")["y"]

    assert torch.autograd.gradcheck(call, tuple(tensors.values()))
    assert torch.autograd.gradgradcheck(call, tuple(tensors.values()), atol=1e-4)


@every
def test_the_operator_is_what_torch_compile_expects(method: Method):
    case = verify.Case(method.name.lower(), 5, 7, 6, method.example.r, config=method.example)
    tensors = verify.make_inputs(case, torch.float32, "cpu")
    x, weight, bias, A, B, *weights = (
        tensors[n].requires_grad_() for n in ("x", "weight", "bias", *verify._adapter(tensors))
    )
    plan = ops.bottleneck.choose_plan("native", 5, torch.float32, "cpu", method.mixer.name)
    assert plan.mix == ("native" if "native" in method.mixer.implementations else "aten")
    options = (method.mixer.name, list(case.numbers), 2.0, 0.0, plan.key)
    others = (*(weights or (None,)), None, None, None)
    torch.library.opcheck(torch.ops.gci_kernels.bottleneck.default, (x, weight, bias, A, B, *others, *options))


@every
def test_verify_has_a_case_of_it(method: Method):
    assert any(case.method == method.name.lower() for case in verify.cases())


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.ones(2, 8), ValueError, r"A must be \[any, 8\], got \[2, 9\]"),
        (torch.ones(2, 9, dtype=torch.float64), TypeError, "weight must have x's dtype torch.float64, got"),
        (torch.ones(2, 9, dtype=torch.int64), TypeError, "x must be floating point, got torch.int64"),
        (torch.ones(2, 9, device="meta"), ValueError, "A must be on x's device meta, got cpu"),
    ],
)
@pytest.mark.parametrize("config_cls", (HydraLoRAConfig, LoraConfig))
def test_an_input_that_does_not_fit_is_named(config_cls, x: Tensor, error, says: str):
    """A layer's parameters fit each other; what a call brings is checked where it does not fit them."""
    layer = patch(nn.Sequential(nn.Linear(9, 6)), config_cls(r=2, target_modules=["0"]))
    with pytest.raises(error, match=says):
        layer(x)


def test_an_adapter_in_two_functions():
    """The numbers of HydraLoRA by its own definition, an expert at a time."""
    torch.manual_seed(0)
    layer = patch(nn.Sequential(nn.Linear(9, 6)), HydraLoRAConfig(r=2, target_modules=["0"], init_weights=False))
    layer, x = layer.base_model.model[0], torch.randn(4, 9)
    A, B, router = layer.tensors("default")
    gates = (x @ router.T).softmax(-1)
    y = layer.base_layer(x)
    for expert in range(3):
        y = y + 16 * gates[:, expert, None] * (x @ A.T @ B[:, 2 * expert : 2 * expert + 2].T)
    assert relative_error(layer(x), y) < 1e-6
