"""What registering a method refuses, each with what is wrong and whose it is, and what it leaves behind: nothing."""

import dataclasses
from typing import ClassVar

import pytest
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from toy_adapters import llama
from transformers.pytorch_utils import Conv1D

import gci_kernels
from gci_kernels import BottleneckConfig, Method, Mixer, ops, patch
from gci_kernels.ops import Output
from gci_kernels.ops.bottleneck.registry import MIXERS, STAGES
from gci_kernels.proof import verify
from gci_kernels.tuners import METHODS, registered


@dataclasses.dataclass
class TrialConfig(BottleneckConfig):
    """A method of this file."""

    method: ClassVar[str] = "Trial"


@dataclasses.dataclass
class SilentConfig(BottleneckConfig):
    """Its __post_init__ forgets the others'."""

    method: ClassVar[str] = "Silent"

    def __post_init__(self):
        pass


class FieldsLostConfig(BottleneckConfig):
    """Not a dataclass itself, so that its fields are no fields."""

    method: ClassVar[str] = "FieldsLost"
    experts: int = 3


def named(name: str):
    return dataclasses.make_dataclass(
        "NamedConfig", [("method", ClassVar[str], name)], bases=(BottleneckConfig,), namespace={"method": name}
    )


def tensors(config, in_features, out_features):
    return {"A": torch.randn(config.r, in_features), "B": torch.randn(out_features, config.r)}


def with_weights(config, in_features, out_features):
    return tensors(config, in_features, out_features) | {"W": torch.randn(config.r, in_features)}


def identity(h, weights, call):
    return h


def method(config=TrialConfig, formula=identity, mixer=None, **changes) -> Method:
    options = {name: changes.pop(name) for name in ("joins", "output", "columns", "merge") if name in changes}
    fields = dict(parameters=tensors, describe=lambda c: "", example=config(r=2))
    return Method(config, mixer or Mixer("on trial", formula, **options), **fields | changes)


@pytest.fixture(autouse=True)
def forgotten():
    """What a test registers is forgotten behind it, and a registration that fails has left nothing."""
    before = [set(each) for each in (METHODS, MIXERS, STAGES, PEFT_TYPE_TO_CONFIG_MAPPING)]
    yield
    for name in METHODS.keys() - before[0]:
        gci_kernels.unregister(name)
    assert [set(each) for each in (METHODS, MIXERS, STAGES, PEFT_TYPE_TO_CONFIG_MAPPING)] == before
    assert not hasattr(registered, "TrialLinear")


def in_place(h, weights, call):
    return h.detach().mul_(2) + h


def clamps(h, logits, call):
    return h * logits.clamp_(0, 0.5)


RECORDS = {
    "taken": (lambda: method(named("LORAMOE")), "a method 'LORAMOE' is registered already"),
    "taken by LoKI": (lambda: method(named("loki")), "a method 'loki' is registered already"),
    "taken by PEFT": (lambda: method(named("LoRA")), "a method 'LoRA' is registered already"),
    "no name": (lambda: method(named("")), "the name must consist of letters"),
    "no identifier": (lambda: method(named("my adapter")), "the name must consist of letters"),
    "super": (lambda: method(SilentConfig), r"__post_init__ of SilentConfig must call super\(\).__post_init__\(\)"),
    "no dataclass": (lambda: method(FieldsLostConfig), "config must be a dataclass derived from BottleneckConfig"),
    "no record": (lambda: None, "register takes a gci_kernels.Method, got None"),
    "describes nothing": (lambda: method(describe=lambda c: None), "`describe` must return a string, got None"),
    "describe raises": (lambda: method(describe=lambda c: c.gone), "`describe` raised AttributeError"),
    "saves what is not there": (lambda: method(saved=("gone",)), "`saved` names 'gone'"),
    "saves a set": (lambda: method(saved=("rank_pattern",)), "`saved` names 'rank_pattern'"),
    "letters": (lambda: method(default_targets="q_proj"), "default_targets must be a tuple of names"),
    "no targets": (lambda: method(default_targets=()), "default_targets must be a tuple of names"),
    "settings": (lambda: method(settings=lambda c: (1.5,)), r"must return a tuple of integers, got \(1.5,\)"),
    "a flag": (lambda: method(settings=lambda c: (True,)), "`settings` must return a tuple of integers"),
    "a number": (lambda: method(settings=lambda c: 3), "`settings` must return a tuple of integers"),
    "parameters": (lambda: method(parameters=lambda c, i, o: c.gone), "`parameters` raised AttributeError"),
    "a list": (lambda: method(parameters=lambda c, i, o: []), "`parameters` must return a dictionary"),
    "integers": (
        lambda: method(parameters=lambda c, i, o: {"A": torch.ones(2, i), "B": torch.ones(o, 2).int()}),
        "a dictionary of floating-point tensors",
    ),
    "B turned": (
        lambda: method(parameters=lambda c, i, o: {"A": torch.ones(2, i), "B": torch.ones(2, o)}),
        r"must return B \[6, 2\], got \[2, 6\]",
    ),
    "A too wide": (
        lambda: method(parameters=lambda c, i, o: {"A": torch.ones(2, i + 1), "B": torch.ones(o, 2)}),
        r"must return A \[at least 1, 8\], got \[2, 9\]",
    ),
    "a vector": (
        lambda: method(parameters=lambda c, i, o: tensors(c, i, o) | {"d": torch.ones(c.r)}),
        r"must return d \[at least 1, any\], got \[2\]",
    ),
    "nothing to join": (lambda: method(joins=True), "the weights that the mixer 'on trial' joins with A"),
    "names that clash": (
        lambda: method(parameters=lambda c, i, o: tensors(c, i, o) | {"lora_B": torch.ones(1, 1)}),
        "which are not all different or are taken",
    ),
    "raises": (lambda: method(formula=lambda h, w, call: h.gone), "formula raised AttributeError"),
    "two arguments": (lambda: method(formula=lambda h, w: h), "formula raised TypeError"),
    "in place": (lambda: method(formula=in_place), "changes its arguments in place"),
    "weights in place": (
        lambda: method(formula=clamps, joins=True, parameters=with_weights), "changes its arguments in place",
    ),
    "detached": (lambda: method(formula=lambda h, w, call: h.detach()), "returned u through which no gradient flows"),
    "elsewhere": (lambda: method(formula=lambda h, w, call: h.to("meta")), "returned torch.float64 on meta"),
    "rounded": (lambda: method(formula=lambda h, w, call: h.float()), "returned torch.float32 on cpu for h of"),
    "noise": (lambda: method(formula=lambda h, w, call: h + torch.randn_like(h)), "gives different values each time"),
    "other tokens": (lambda: method(formula=lambda h, w, call: h.cumsum(-2)), "mixes tokens"),
    "no effect": (lambda: method(formula=lambda h, w, call: 0 * h), "has no effect with the example"),
    "three values": (lambda: method(formula=lambda h, w, call: (h, h, h)), "its formula returned 3 values, not u"),
    "output by name": (lambda: method(output="nothing"), "its mixer's output must be an Output"),
    "constant output": (
        lambda: method(formula=lambda h, w, call: (h, h.detach()), output=Output.DIFFERENTIABLE),
        "returned an output through which no gradient flows",
    ),
    "columns": (lambda: method(columns=lambda rank: rank), "`columns` raised TypeError"),
    "merge": (lambda: method(merge=lambda A, w, numbers: 2 * A), "its `merge` do not agree"),
    "no merge": (lambda: method(formula=lambda h, w, call: h.tanh(), merge=lambda A, w, n: A), "`merge` do not agree"),
    "implementations": (
        lambda: method(mixer=Mixer("on trial", identity, implementations=frozenset(("cuda",)))),
        r"has implementations \['cuda'\]; there are 'native' and 'triton'",
    ),
    "kernel": (lambda: method(mixer=Mixer("on trial", identity, kernel="gone")), "names the kernel 'gone'; there are "),
}  # fmt: skip


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_that_cannot_work_is_refused(record: str):
    make, says = RECORDS[record]
    made = make()
    with pytest.raises((TypeError, ValueError), match=says) as raised:
        gci_kernels.register(made)
    named_in = str(raised.value)
    assert made is None or any(name in named_in for name in (made.name, made.config.__name__, made.mixer.name))


def test_registering_again_after_a_mistake_and_after_unregister():
    with pytest.raises(ValueError, match="formula raised"):
        gci_kernels.register(method(formula=lambda h, w, call: h.gone))
    gci_kernels.register(method())
    model = patch(llama(), TrialConfig(r=4))
    gci_kernels.unregister("Trial")
    gci_kernels.register(method(formula=lambda h, w, call: 2 * h))
    assert isinstance(model, PeftModel) and METHODS["Trial"].mixer.name == "on trial"


@pytest.mark.parametrize("name", ("LoRAMoE", "ALoRA", "gone"))
def test_unregister_knows_its_own_alone(name: str):
    with pytest.raises(ValueError, match=f"{name!r} is none of the methods that were registered beside"):
        gci_kernels.unregister(name)


def test_registering_draws_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    gci_kernels.register(method())
    assert torch.equal(torch.rand(3), expected)


def test_a_config_that_names_no_method():
    with pytest.raises(TypeError, match="BottleneckConfig has no `method`"):
        BottleneckConfig()


def test_a_config_of_no_registered_method():
    with pytest.raises(ValueError, match="TrialConfig: its method is not registered; call gci_kernels.register"):
        patch(llama(), TrialConfig(r=2))


def test_tensors_that_parameters_shares_are_every_layers_own():
    """A constant of the module stays one, and what expand() makes is written out."""
    eye = torch.eye(2)
    gci_kernels.register(
        method(
            formula=lambda h, w, call: h @ w,
            parameters=lambda c, i, o: {"A": torch.ones(1, i).expand(c.r, i), "B": torch.randn(o, c.r), "M": eye},
        )
    )
    model = patch(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), TrialConfig(r=2, target_modules=["0", "1"]))
    first, second = (model.base_model.model[i].gci_trial_M["default"] for i in range(2))
    with torch.no_grad():
        first.mul_(3)
    assert torch.equal(second, torch.eye(2)) and torch.equal(eye, torch.eye(2))
    assert model.base_model.model[0].gci_trial_A["default"].is_contiguous()


def test_tensors_that_fit_some_layers_only():
    """The layer that they do not fit is told by its sizes."""

    def sometimes(config, in_features, out_features):
        made = tensors(config, in_features, out_features)
        return made | {"B": made["B"][:-1]} if out_features == 16 else made

    gci_kernels.register(method(parameters=sometimes))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16))
    with pytest.raises(ValueError, match=r"method 'Trial': `parameters` must return B \[16, 2\], got \[15, 2\]"):
        patch(model, TrialConfig(r=2, target_modules=["0", "1"]))


def test_settings_of_the_op_are_integers():
    x, A, B = torch.ones(2, 4), torch.ones(2, 4), torch.ones(3, 2)
    options = dict(mixer=ops.bottleneck.mixers.IDENTITY, scaling=1.0)
    with pytest.raises(TypeError, match=r"settings must be integers, got \(1.5,\)"):
        ops.bottleneck_linear(x, None, None, A, B, settings=(1.5,), **options)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_merging_with_weights_of_the_mixers_own(dtype):
    mix = Mixer("on trial", lambda h, w, call: h @ w.T, merge=lambda A, w, numbers: w @ A)
    parameters = lambda c, i, o: tensors(c, i, o) | {"M": torch.randn(c.r, c.r)}  # noqa: E731
    gci_kernels.register(method(mixer=mix, parameters=parameters))
    model = nn.Sequential(nn.Linear(8, 8)).to(dtype)
    model = patch(model, TrialConfig(r=2, target_modules=["0"]))
    x = torch.randn(4, 8, dtype=dtype)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, **({"rtol": 0.05, "atol": 0.2} if dtype.itemsize == 2 else {}))


class Doubled(nn.Linear):
    """Computes something else than x @ W.T + b."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_no_merging_into_a_layer_that_computes_something_else():
    gci_kernels.register(method(merge=lambda A, w, numbers: A))
    model = patch(nn.Sequential(Doubled(8, 8)), TrialConfig(r=2, target_modules=["0"], init_weights=False))
    with pytest.raises(ValueError, match=r"Trial cannot be merged into a Doubled, which computes something else"):
        model.merge_adapter()


def test_merging_into_a_square_Conv1D():
    gci_kernels.register(method(merge=lambda A, w, numbers: A))
    model = patch(nn.Sequential(Conv1D(8, 8)), TrialConfig(r=2, target_modules=["0"], init_weights=False))
    x = torch.randn(4, 8)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_verify_goes_on_after_an_error(monkeypatch):
    """A formula that fails at some sizes is a failed check, with its words, and the other checks are made."""
    gci_kernels.register(method(formula=lambda h, w, call: h if h.shape[-2] < 9 else h.view(0)))
    case = next(case for case in verify.cases() if case.method == "trial")
    monkeypatch.setattr(verify, "cases", lambda: (case, verify.CASES[0]))
    checks = [check for group in verify.verify() for check in group]
    failed = [check for check in checks if not check.passed]
    assert failed and all("trial" in check.case and check.tensor.startswith("RuntimeError: ") for check in failed)
    assert any("lora " in check.case for check in checks if check.passed)
