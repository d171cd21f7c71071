"""LoKI as the PEFT method GCI_LOKI: whole tiny models against a restatement with the rows written into the weight."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from toy_loki import IDS, POSITIONS, adapted, assert_same, config, gradients, logits, loki_layers, plain, restated

from gci_kernels import LoKIConfig, LoRAMoEConfig, patch, report, unpatch
from gci_kernels.accuracy import relative_error
from gci_kernels.tuners import loki

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.smoke
@pytest.mark.parametrize("family", ("llama", "gpt_neox", "gpt2"))
@pytest.mark.parametrize("changes", [{}, {"r": 2}, {"keep_merged": False}], ids=str)
def test_output_and_gradients_equal_the_restatement(family, changes):
    model = adapted(family, **changes)
    expected = restated(model)
    assert relative_error(logits(model), logits(plain(family))) > 1e-2, "the adapter shows"
    parts = {"loki_active"} if "r" not in changes else {"loki_A", "loki_lora_B"}
    trained = {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == parts | {"loki_active_bias"}
    assert_same(model, expected)
    assert len(gradients(model)) == 1 + 2 * (1 + len(parts))  # two layers have rows


@pytest.mark.parametrize("changes", [{}, {"r": 2}], ids=str)
def test_a_model_without_bias(changes):
    torch.manual_seed(1)
    model = get_peft_model(plain(mlp_bias=False), config(**changes)).double().eval()
    assert not any("active_bias" in name for name, _ in model.named_parameters())
    assert_same(model, restated(model))


@pytest.mark.parametrize("r", (None, 2))
def test_new_adapter_changes_nothing(r):
    model = get_peft_model(plain(), LoKIConfig(positions=POSITIONS, r=r)).double().eval()
    assert relative_error(logits(model), logits(plain())) < 1e-14


@pytest.mark.parametrize("r", (None, 2))
@pytest.mark.parametrize("kind", ("hook", "subclass", "replaced forward"))
def test_a_base_layer_that_must_be_called_is_called(kind, r):
    model = adapted(r=r)
    expected = gradients(restated(model))
    for layer in loki_layers(model).values():
        base = layer.base_layer
        if kind == "hook":
            base.register_forward_hook(lambda module, args, output: output * 1)
        elif kind == "subclass":
            base.__class__ = type("Quantised", (nn.Linear,), {})
        else:
            base.forward = lambda x, own=base.forward: own(x)
    actual = gradients(model)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-12, name


# Training, and what surrounds it


@pytest.mark.parametrize("changes", [{}, {"r": 2}, {"keep_merged": False}], ids=str)
def test_twenty_steps_of_adamw_lower_the_loss_and_leave_the_base_alone(changes):
    model = adapted(dtype=torch.float32, **changes).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == ("loki_" not in name or "positions" in name or "settings" in name), (
            name
        )
    assert_same(model.eval(), restated(model), 1e-4)


@pytest.mark.parametrize("use_reentrant", (True, False))
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    model, expected = adapted().train(), gradients(restated(adapted()))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    actual = gradients(model)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-12, name


def test_autocast_and_16_bits():
    model = adapted(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(model)
    assert mixed["logits"].dtype == torch.bfloat16
    for name, value in gradients(model).items():
        assert relative_error(mixed[name], value) < 5e-2, name
    half = get_peft_model(plain(dtype=torch.bfloat16), config())
    assert {p.dtype for n, p in half.named_parameters() if "loki_" in n} == {torch.float32}, "PEFT's default"
    results = gradients(half)
    assert results["logits"].dtype == torch.bfloat16 and results[min(results)].dtype == torch.float32


def test_generates_the_same_tokens_as_the_restatement():
    model = adapted()
    generate = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(**generate), restated(model).generate(**generate))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent_and_compute_the_same(duplicate):
    model = adapted()
    before = gradients(model)["logits"]
    twin = duplicate(model)
    assert torch.equal(gradients(twin)["logits"], before)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(gradients(model)["logits"], before)


def test_compiled_layers_give_the_same_numbers():
    model = adapted()
    layer = next(iter(loki_layers(model).values()))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(30, 48, dtype=torch.float64, requires_grad=True)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    for actual, expected in zip(
        torch.autograd.grad(compiled(x).sin().sum(), trained),
        torch.autograd.grad(layer(x).sin().sum(), trained),
        strict=True,
    ):
        assert relative_error(actual, expected) < 1e-12


def test_the_kept_copy_is_there_in_training_and_where_it_is_wanted(monkeypatch):
    calls = []
    real = loki.MergedRows.renewed
    monkeypatch.setattr(loki.MergedRows, "renewed", lambda *a, **k: calls.append(1) or real(*a, **k))
    gradients(adapted(keep_merged=False))
    logits(adapted())
    assert not calls
    model = adapted()
    gradients(model)
    assert len(calls) == 2
    copies = [layer.merged_rows.has(torch.device("cpu")) for layer in loki_layers(model).values()]
    model.float()
    assert copies == [True, True] and not any(
        l.merged_rows.has(torch.device("cpu")) for l in loki_layers(model).values()
    )


@pytest.mark.parametrize("by", ("FSDP", "ZeRO-3"))
def test_no_copy_is_kept_of_a_weight_that_is_gathered_for_a_call(by):
    """By the marks that torch and DeepSpeed set; test_loki_sharded.py has torch's sharding itself."""
    model = adapted()
    gradients(model)
    layers = loki_layers(model).values()
    assert all(layer.merged_rows.copies() for layer in layers)
    for layer in layers:
        marked, name = (
            (layer.base_layer, "_is_fsdp_managed_module") if by == "FSDP" else (layer.base_layer.weight, "ds_id")
        )
        setattr(marked, name, 1)
    assert_same(model, restated(model))
    assert not any(layer.merged_rows.copies() for layer in layers)
    assert all("kept" not in line.plan for line in report(model) if line.plan)


def test_on_top_of_a_lora_layer_of_peft():
    """PEFT's tuners can be stacked; the lower one is then called as it is."""
    lower = get_peft_model(plain(), LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    model = get_peft_model(lower.base_model.model, config()).double().eval()
    layer, x = next(iter(loki_layers(model).values())), torch.randn(4, 48, dtype=torch.float64)
    rows = layer.loki_positions["default"]
    expected = layer.base_layer(x).index_copy(
        1, rows, F.linear(x, layer.loki_active["default"], layer.loki_active_bias["default"])
    )
    assert relative_error(layer(x), expected) < 1e-12


def test_patch_adds_the_adapter_and_unpatch_takes_it_away():
    model = plain().eval()
    patched = patch(model, config(r=None), adapter_name="mine")
    assert len(loki_layers(patched)) == 2 and list(patched.peft_config) == ["mine"]
    patched(input_ids=IDS, labels=IDS).loss.backward()
    assert unpatch(patched) is model and torch.equal(logits(model), logits(plain().eval()))
    assert not loki_layers(model) and all(parameter.requires_grad for parameter in model.parameters())
    assert patch(patch(model, config())) is not None, "patching again changes nothing"


def test_report_names_rows_and_form():
    lines = report(get_peft_model(plain(dtype=torch.float32), config()))
    assert [(line.method, line.shape, line.base, line.plan) for line in lines] == [
        ("LoKI 3 of 32 rows", "48 -> 32", "fused", "rows=kept"),
        ("LoKI 5 of 32 rows", "48 -> 32", "fused", "rows=kept"),
    ]
    assert "rows=merge" in report(get_peft_model(plain(), config(keep_merged=False)))[1].plan
    star = report(get_peft_model(plain(dtype=torch.float32), config(r=2)))[0]
    assert star.method == "LoKI 3 of 32 rows, r=2" and "project=" in star.plan


def test_beside_another_method_of_ours_in_one_model():
    model = patch(plain(), LoRAMoEConfig(target_modules=["up_proj"]))
    both = get_peft_model(model.base_model.model, config())
    assert len(loki_layers(both)) == 2


@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("r", (None, 2))
def test_what_a_base_layer_returned_is_left_as_it_was(r, tokens):
    """A hook may keep it, and a decoding step writes into the base product where nobody can."""
    model, seen = adapted(r=r, dtype=torch.float32), []
    for layer in loki_layers(model).values():
        layer.base_layer.register_forward_hook(lambda module, args, y: seen.append((y, y.clone())))
    with torch.no_grad():
        model(input_ids=IDS[:, :1].repeat(1, tokens))
    assert len(seen) == 2 and all(torch.equal(y, copied) for y, copied in seen)


def _train_base(layer):
    layer.base_layer.weight.requires_grad_()


def _train_base_bias(layer):
    layer.base_layer.bias.requires_grad_()


def _more_positions(layer):
    layer.loki_positions["default"] = torch.arange(4)


def _narrow_positions(layer):
    layer.loki_positions["default"] = layer.loki_positions["default"].int()


def _narrow_rows(layer):
    layer.loki_active["default"] = nn.Parameter(torch.zeros(3, 5))


def _unknown_impl(layer):
    layer.gci_impl = "fastest"


UNFIT = [
    (lambda layer: None, (2, 47), "weight must be .any, 47., got .32, 48."),
    (lambda layer: None, (), "x must be ...., in. with in >= 1"),
    (lambda layer: layer.base_layer.float(), (2, 48), "weight must have x's dtype torch.float64, got torch.float32"),
    (_train_base, (2, 48), "weight must be frozen"),
    (_train_base_bias, (2, 48), "bias must be frozen"),
    (_more_positions, (2, 48), "active_weight must be .4, in. like positions"),
    (_narrow_positions, (2, 48), "positions must be int64"),
    (_narrow_rows, (2, 48), "active_weight must be .any, 48., got .3, 5."),
    (_unknown_impl, (2, 48), "impl='fastest' is unknown"),
]


@pytest.mark.parametrize("change, shape, message", UNFIT)
def test_a_layer_says_what_does_not_fit(change, shape, message):
    layer = next(iter(loki_layers(adapted()).values()))
    layer(torch.randn(2, 48, dtype=torch.float64))
    change(layer)
    with pytest.raises((ValueError, TypeError), match=message):
        layer(torch.randn(shape, dtype=torch.float64))
