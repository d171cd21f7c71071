"""LoKI as the PEFT method GCI_LOKI: whole tiny models against a restatement with the rows written into the weight."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from gci_kernels import LoKIConfig, LoRAMoEConfig, patch, report, unpatch
from gci_kernels.accuracy import relative_error
from gci_kernels.loki import select, write_positions
from gci_kernels.loki.scores import ScoresFile
from gci_kernels.tuners import LoKILinear, loki

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 77], [8, 2, 36, 62, 8, 30, 21], [1, 44, 2, 96, 55, 13, 70]])
POSITIONS = [[31, 4, 17], [], [0, 5, 6, 7, 29]]
SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


def plain(family: str = "llama", dtype: torch.dtype = torch.float64, **changes) -> nn.Module:
    """The same model at every call; down_proj has a bias."""
    torch.manual_seed(0)
    if family == "llama":
        settings = SMALL | dict(num_key_value_heads=2, mlp_bias=True, initializer_range=0.2) | changes
        model = LlamaForCausalLM(LlamaConfig(**settings))
    elif family == "gpt_neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, initializer_range=0.2))
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=97, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2, resid_pdrop=0, attn_pdrop=0
            )
        )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def config(**changes) -> LoKIConfig:
    return LoKIConfig(**{"positions": POSITIONS, "init_weights": False, "lora_alpha": 3} | changes)


def adapted(family: str = "llama", dtype: torch.dtype = torch.float64, **changes) -> PeftModel:
    model = plain(family, dtype)
    torch.manual_seed(1)
    model = get_peft_model(model, config(**changes))
    for name, parameter in model.named_parameters():
        if "active_bias" in name:
            nn.init.normal_(parameter)
    return model.to(dtype).eval()


def loki_layers(model: nn.Module) -> dict[str, LoKILinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoKILinear)}


class RestatedLoKI(nn.Module):
    """Section 3 of the design: W and b with rows replaced, each time anew."""

    def __init__(self, layer: LoKILinear, names: list[str]) -> None:
        super().__init__()
        base = copy.deepcopy(layer.get_base_layer())
        self.weight = (base.weight.t() if isinstance(base, Conv1D) else base.weight).detach()
        self.bias = None if base.bias is None else base.bias.detach()
        self.names, self.scaling = names, layer.scaling
        self.positions = {name: layer.loki_positions[name] for name in layer.r}
        for part in layer.adapter_layer_names:
            setattr(self, part, copy.deepcopy(getattr(layer, part)))

    def forward(self, x):
        weight, bias = self.weight, self.bias
        for name in self.names:
            if name not in self.positions:
                continue
            rows = self.positions[name]
            if name in self.loki_active:
                weight = weight.index_put((rows,), self.loki_active[name])
            else:
                change = self.scaling[name] * self.loki_lora_B[name] @ self.loki_A[name]
                weight = weight.index_put((rows,), weight[rows] + change)
            if bias is not None:
                bias = bias.index_put((rows,), self.loki_active_bias[name])
        return F.linear(x, weight, bias)


def restated(model: PeftModel, names: tuple[str, ...] = ("default",)) -> nn.Module:
    twin = copy.deepcopy(model)
    for name, layer in loki_layers(twin).items():
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, RestatedLoKI(layer, list(names)))
    return twin


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(input_ids=IDS).logits
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return {"logits": out.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, expected: nn.Module, tolerance: float = 1e-12) -> None:
    actual, wanted = gradients(model), gradients(expected)
    assert actual.keys() == wanted.keys() and len(wanted) > 1
    for name, value in wanted.items():
        assert relative_error(actual[name], value) < tolerance, name


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


# Where the rows come from


def in_file(tmp_path, positions):
    path = tmp_path / "positions.json"
    path.write_text(json.dumps(positions))
    return path


NAMES = [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
FORMS = {
    "list": lambda _: POSITIONS,
    "tuples": lambda _: tuple(map(tuple, POSITIONS)),
    "tensors": lambda _: [torch.tensor(rows, dtype=torch.int32) for rows in POSITIONS],
    "numbers": lambda _: {0: POSITIONS[0], 2: POSITIONS[2]},
    "names": lambda _: {NAMES[2]: POSITIONS[2], NAMES[0]: POSITIONS[0]},
    "ends of names": lambda _: {"layers.0.mlp.down_proj": POSITIONS[0], "2.mlp.down_proj": POSITIONS[2]},
    "file": lambda folder: in_file(folder, POSITIONS),
    "file's name": lambda folder: str(in_file(folder, POSITIONS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_say_which_rows(form, tmp_path):
    model = get_peft_model(plain(), LoKIConfig(positions=FORMS[form](tmp_path)))
    found = {
        name.removeprefix("base_model.model."): m.loki_positions["default"].tolist()
        for name, m in loki_layers(model).items()
    }
    assert found == {NAMES[0]: [4, 17, 31], NAMES[2]: [0, 5, 6, 7, 29]}
    assert model.peft_config["default"].rows == {NAMES[0]: 3, NAMES[2]: 5}


def test_rows_from_a_scores_file(tmp_path):
    scores, path = torch.randn(4, 3, 32), tmp_path / "scores.safetensors"
    with ScoresFile(path, texts=[1, 2, 3, 4], shape=(3, 32), settings={}) as file:
        for sample, values in enumerate(scores):
            file.write(sample, values)
    model = get_peft_model(plain(), LoKIConfig(positions=path, quota=12.5))
    rows = [layer.loki_positions["default"].tolist() for layer in loki_layers(model).values()]
    assert rows == select(scores, 12.5)
    saved = model.peft_config["default"].to_dict()
    assert saved["positions"] is None and saved["quota"] is None, "the rows are saved, not where they came from"
    write_positions(select(scores, 12.5), tmp_path / "p.json")
    same = get_peft_model(plain(), LoKIConfig(positions=tmp_path / "p.json"))
    assert [layer.loki_positions["default"].tolist() for layer in loki_layers(same).values()] == rows


def test_other_targets():
    by_name = get_peft_model(plain(), LoKIConfig(positions=POSITIONS, target_modules=["o_proj"]))
    by_pattern = get_peft_model(plain(), LoKIConfig(positions=POSITIONS, target_modules=r".*\.self_attn\.o_proj"))
    for model in (by_name, by_pattern):
        assert [name.rpartition(".")[2] for name in loki_layers(model)] == ["o_proj", "o_proj"]


def test_layers_inside_of_adapters_are_no_targets():
    """A pattern that would also match what an adapted layer is made of."""
    model = adapted()
    model.add_adapter("other", config(positions=[[2], [3], [4]], target_modules=r".*down_proj.*"))
    assert all(type(layer.base_layer) is nn.Linear for layer in loki_layers(model).values())
    assert len(loki_layers(model)) == 3


def test_the_last_projection_is_found_beside_others_of_its_name():
    """GPT-2's attention ends in a c_proj too."""
    names = loki_layers(adapted("gpt2"))
    assert [name.removeprefix("base_model.model.") for name in names] == [
        f"transformer.h.{n}.mlp.c_proj" for n in (0, 2)
    ]


BAD = [
    (dict(positions=[[1], [2]]), "positions are for 2 decoder layers, this model has 3"),
    (dict(positions=[[1], [2], [32]]), r"positions of model.layers.2.mlp.down_proj: .* from 0 to 31, got 32"),
    (dict(positions=[[1], [2], [-1]]), "from 0 to 31, got -1"),
    (dict(positions=[[1], [2, 2], [3]]), "layers.1.mlp.down_proj: positions must be distinct, got 2 more than once"),
    (dict(positions=[[], [], []]), "positions must name at least one row"),
    (dict(positions={}), "positions must name at least one row"),
    (dict(positions=[[1], [2.5], [3]]), "positions of model.layers.1.mlp.down_proj must be row indices"),
    (dict(positions=[[1], [[2]], [3]]), "positions of model.layers.1.mlp.down_proj must be row indices"),
    (
        dict(positions={"layers.7.mlp.down_proj": [1]}),
        "0 linear layers of this model are named 'layers.7.mlp.down_proj'",
    ),
    (dict(positions={"mlp.down_proj": [1]}), "3 linear layers of this model are named 'mlp.down_proj'"),
    (dict(positions={7: [1]}), "decoder layer 7 has 0 modules"),
    (dict(positions={"layers.0.mlp.down_proj": [1], 1: [2]}), "layer numbers or module names as keys, not both"),
    (dict(positions={"0.mlp.down_proj": [1], "layers.0.mlp.down_proj": [2]}), "positions name a module twice"),
    (dict(positions=3), "positions must be a file, a list or a mapping, got int"),
    (dict(positions=POSITIONS, target_modules=["up_proj", "down_proj"]), "decoder layer 0 has 2 modules"),
    (dict(positions=POSITIONS, target_modules=["lm_head"]), r"decoder layer 0 has 0 modules .* \(none\)"),
    (dict(positions=POSITIONS, quota=10), "quota selects rows from a scores file"),
    (dict(positions="scores.safetensors"), "quota selects rows from a scores file"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_positions_that_do_not_fit_are_named_and_nothing_is_changed(arguments, message):
    model = plain()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        patch(model, LoKIConfig(**arguments))
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


BAD_CONFIG = [
    (dict(positions=POSITIONS, r=0), ValueError, "r must be at least 1"),
    (dict(positions=POSITIONS, r=2.0), TypeError, "r must be an integer"),
    (dict(positions=POSITIONS, lora_alpha=float("nan")), ValueError, "lora_alpha"),
    (dict(positions="s.h5", quota=0), ValueError, "quota must be above 0 and at most 100"),
    (dict(positions="s.h5", quota=101), ValueError, "quota must be above 0 and at most 100"),
    (dict(positions="s.h5", quota="5"), TypeError, "quota must be a number"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CONFIG, ids=[m for *_, m in BAD_CONFIG])
def test_bad_config_names_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        LoKIConfig(**arguments)


# Saving and loading


@pytest.mark.smoke
@pytest.mark.parametrize("r", (None, 2))
@pytest.mark.parametrize("low_cpu_mem_usage", (False, True))
def test_save_and_load(tmp_path, r, low_cpu_mem_usage):
    model = adapted(dtype=torch.float32, r=r)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    parts = {"loki_active_bias", "loki_positions", "loki_settings._extra_state"} | (
        {"loki_active"} if r is None else {"loki_A", "loki_lora_B"}
    )
    assert set(weights) == {f"{name}.{part}" for name in loki_layers(model) for part in parts}
    saved = PeftConfig.from_pretrained(tmp_path)
    assert type(saved) is LoKIConfig and saved.positions is None and saved.rows == model.peft_config["default"].rows

    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(
            plain(dtype=torch.float32), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=trainable
        )
        assert torch.equal(logits(loaded), logits(model))
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} == (
            {n for n, p in model.named_parameters() if p.requires_grad} if trainable else set()
        )


def test_a_config_that_was_used_finds_the_rows_of_another_model_again():
    settings = config()
    get_peft_model(plain(), settings)
    other = get_peft_model(plain("gpt2"), settings)
    assert [layer.loki_positions["default"].tolist() for layer in loki_layers(other).values()] == [
        [4, 17, 31],
        [0, 5, 6, 7, 29],
    ]


def change_file(folder, change):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def test_adapters_of_other_models_and_damaged_ones_are_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="adapter is of another model: here are no modules model.layers.2.mlp.down_proj"
    ):
        PeftModel.from_pretrained(plain(num_hidden_layers=2), tmp_path)
    with pytest.raises(
        ValueError, match="mlp.down_proj: the adapter's .* saved with out_features=32, here is out_features=16"
    ):
        PeftModel.from_pretrained(plain(hidden_size=16), tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(plain(intermediate_size=40), tmp_path)

    key = "base_model.model.model.layers.0.mlp.down_proj.loki_positions"
    change_file(tmp_path, lambda weights: weights[key].copy_(torch.tensor([3, 9, 3])))
    with pytest.raises(ValueError, match="positions must be distinct, got 3 more than once"):
        PeftModel.from_pretrained(plain(), tmp_path)
    change_file(tmp_path, lambda weights: weights.pop(key))
    with pytest.raises(
        ValueError, match="adapter 'default' does not fit: it lacks .*layers.0.mlp.down_proj.loki_positions"
    ):
        PeftModel.from_pretrained(plain(), tmp_path)
    model = get_peft_model(plain(), PeftConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="adapter 'default' has no positions"):
        model(input_ids=IDS)


# Merging


@pytest.mark.parametrize("family", ("llama", "gpt2"))
@pytest.mark.parametrize("r", (None, 2))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_merge_and_unload_gives_a_plain_model_whose_other_rows_keep_their_bits(tmp_path, family, r, dtype):
    model = adapted(family, dtype, r=r)
    rows = {name: layer.loki_positions["default"] for name, layer in loki_layers(model).items()}
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain(family).modules()]
    assert relative_error(logits(merged), expected) < (1e-5 if dtype == torch.float32 else 3e-2)
    original = plain(family, dtype).state_dict()
    for name, value in merged.state_dict().items():
        owner = f"base_model.model.{name.rpartition('.')[0]}"
        if owner not in rows:
            assert torch.equal(value, original[name]), name
            continue
        transposed = family == "gpt2" and value.dim() == 2
        new, old = (t.t() if transposed else t for t in (value, original[name]))
        changed = (new != old) if new.dim() == 1 else (new != old).any(1)
        assert changed.nonzero().flatten().tolist() == rows[owner].tolist(), name

    merged.save_pretrained(tmp_path)
    reloaded = type(merged).from_pretrained(tmp_path, dtype=dtype).eval()
    assert all(torch.equal(value, merged.state_dict()[name]) for name, value in reloaded.state_dict().items())
    if dtype == torch.float32:  # to(bfloat16) rounds the angles of positions too, which loading computes anew
        assert torch.equal(logits(reloaded), logits(merged))


@pytest.mark.parametrize("r", (None, 2))
def test_merged_then_unmerged(r):
    model = adapted(r=r)
    before, weights = logits(model), copy.deepcopy(plain().state_dict())
    model.merge_adapter()
    assert relative_error(logits(model), before) < 1e-12
    with model.disable_adapter():
        model.unmerge_adapter()
        for name, value in weights.items():
            own = f"base_model.model.{name}".replace("down_proj.", "down_proj.base_layer.")
            found = model.state_dict().get(own, model.state_dict().get(f"base_model.model.{name}"))
            assert torch.equal(found, value), name
    assert torch.equal(logits(model), before)
    assert_same(model, restated(model))


def test_safe_merge_refuses_nan_and_merging_into_what_is_no_plain_weight_raises():
    model = adapted()
    first = next(iter(loki_layers(model).values()))
    first.loki_active["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems"):
        model.merge_and_unload(safe_merge=True)
    model.merge_adapter()
    model.unmerge_adapter()
    first.base_layer.weight = type("Packed", (nn.Parameter,), {})(first.base_layer.weight.data)
    with pytest.raises(ValueError, match="cannot be merged into a Packed"):
        first.merge()


# Several adapters


@pytest.fixture
def two_adapters() -> PeftModel:
    """ "default", and "other" of rank 2 on rows apart from its own."""
    model = adapted()
    torch.manual_seed(2)
    model.add_adapter("other", config(positions=[[5, 6], [9], []], r=2))
    return model.double()


@pytest.mark.parametrize("names", [["default"], ["other"], ["default", "other"], ["other", "default"]], ids="+".join)
def test_active_adapters(two_adapters, names):
    two_adapters.base_model.set_adapter(names)
    assert_same(two_adapters, restated(two_adapters, tuple(names)))
    two_adapters.merge_adapter()
    assert relative_error(logits(two_adapters), logits(restated(two_adapters, ()))) < 1e-12
    two_adapters.unmerge_adapter()
    assert_same(two_adapters, restated(two_adapters, tuple(names)))


def test_adapters_on_the_same_rows_take_turns(two_adapters):
    two_adapters.add_adapter("third", config(positions=[[4], [], []]))
    two_adapters.double().base_model.set_adapter(["default", "third"])
    with pytest.raises(ValueError, match="'default', 'third'.* train some of the same rows"):
        two_adapters(input_ids=IDS)
    with pytest.raises(ValueError, match="some of the same rows"):
        two_adapters.merge_adapter()
    two_adapters.set_adapter("third")
    assert_same(two_adapters, restated(two_adapters, ("third",)))


def test_a_deleted_adapter_is_gone(two_adapters):
    two_adapters.delete_adapter("other")
    assert not any("other" in name for name in two_adapters.state_dict())
    for layer in loki_layers(two_adapters).values():
        assert "other" not in layer.loki_positions.known
    assert torch.equal(logits(two_adapters), logits(adapted()))


def test_loading_a_second_adapter(tmp_path, two_adapters):
    two_adapters.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(plain(), tmp_path)
    model.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        for each in (model, two_adapters):
            each.set_adapter(name)
        assert relative_error(logits(model), logits(two_adapters)) < 1e-6  # PEFT loads adapters in float32


def test_disabled_adapters_give_the_base_model_exactly():
    model = adapted()
    with_adapters = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain()))
    assert torch.equal(logits(model), with_adapters)


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
