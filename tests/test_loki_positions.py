"""Which rows LoKI trains: every way to say it, and what does not fit the model."""

import json

import pytest
import torch
from peft import get_peft_model
from torch import nn
from toy_loki import POSITIONS, adapted, config, loki_layers, plain

from gci_kernels import LoKIConfig, patch
from gci_kernels.loki import select, write_positions
from gci_kernels.loki.scores import ScoresFile

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize(
    "rows, message", [([0, 4, 99], "rows from 0 to 31, got 99"), ([4, 0, 4], "got 4 more than once")]
)
def test_rows_are_checked_when_they_are_set(rows, message):
    layer = next(iter(loki_layers(adapted()).values()))
    before = layer.loki_positions["default"]
    with pytest.raises(ValueError, match=message):
        layer.loki_positions["default"] = torch.tensor(rows)
    assert layer.loki_positions.require("default") is before
