"""Models of the published LoKI to ours and back: the same logits, the same bits, and one error for every fault."""

import json

import published_layers
import pytest
import torch
from peft import PeftModel
from published_layers import (
    LAYOUTS,
    ROWS,
    TOLERANCE,
    cut,
    edit,
    flip,
    logits,
    our_loki,
    read,
    refused,
    same_bits,
    save_split,
    split_model,
    tiny_llama,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from gci_kernels import patch
from gci_kernels.accuracy import relative_error
from gci_kernels.convert import ConvertError, convert, formats, loki, loki_merge_published, recognise
from gci_kernels.loki import read_positions, write_positions
from gci_kernels.tuners.published_loki import FusedPublishedLayer

pytestmark = pytest.mark.usefixtures("one_thread")


split = published_layers.split


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_loki_from_published(tmp_path, layout, bias, dtype):
    tiny_llama(dtype, bias).save_pretrained(tmp_path / "base", max_shard_size="4KB")
    published = split_model(tiny_llama(dtype, bias), layout)
    source = save_split(tmp_path / "published", published, layout, max_shard_size="5KB")
    assert (source / "model.safetensors.index.json").is_file() and recognise(source) is loki.PUBLISHED
    done = convert(source, tmp_path / "ours", base=tmp_path / "base", progress=False)
    assert (done.modules, done.notes) == (1, ()) and recognise(tmp_path / "ours") is loki.OURS
    expected, base = logits(published), tiny_llama(dtype, bias)
    assert relative_error(logits(base), expected) > 0.01
    model = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert relative_error(logits(model), expected) < TOLERANCE[dtype]
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert layer.loki_positions["default"].tolist() == sorted(ROWS[0])
    assert (tmp_path / "ours" / "generation_config.json").is_file()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", ("1GB", "5KB"))
@pytest.mark.parametrize("bias", (True, False))
def test_loki_to_a_plain_checkpoint(tmp_path, layout, size, bias):
    published = split_model(tiny_llama(torch.bfloat16, bias), layout)
    source = save_split(tmp_path / "published", published, layout, max_shard_size=size)
    assert convert(source, tmp_path / "plain", to="plain", progress=False).modules == (1 if layout == "newest" else 2)
    assert recognise(tmp_path / "plain") is formats.PLAIN
    model = LlamaForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    assert relative_error(logits(model), logits(published)) < 1e-2
    expected = tiny_llama(torch.bfloat16, bias).state_dict()
    layer, rows = published.model.layers[0].mlp.down_proj, sorted(ROWS[0])
    expected["model.layers.0.mlp.down_proj.weight"][rows] = layer.get_parameter(LAYOUTS[layout][0]).data
    if bias:
        expected["model.layers.0.mlp.down_proj.bias"][rows] = layer.active_bias.data
    same_bits(model.state_dict(), expected)
    config = read(tmp_path / "plain" / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not config.keys() & {"target_pos", "target_neurons", "auto_map"}


@pytest.mark.parametrize("r", (None, 2))
@pytest.mark.parametrize("size", ("1GB", "4KB"))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_loki_to_published(tmp_path, dtype, bias, size, r):
    model = our_loki(tmp_path / "ours", dtype, bias, r)
    tiny_llama(dtype, bias).save_pretrained(tmp_path / "base", max_shard_size=size)
    done = convert(tmp_path / "ours", tmp_path / "published", base=tmp_path / "base", progress=False)
    assert (done.modules, done.notes) == (1, ())
    assert recognise(tmp_path / "published") is loki.PUBLISHED
    published = split_model(tiny_llama(dtype, bias), trained=False)
    weights = {}
    for path in (tmp_path / "published").glob("model*.safetensors"):
        weights |= load_file(path)
    published.load_state_dict(weights)
    assert relative_error(logits(published), logits(model)) < TOLERANCE[dtype]
    patch(published)
    assert isinstance(published.model.layers[0].mlp.down_proj, FusedPublishedLayer)
    assert relative_error(logits(published), logits(model)) < TOLERANCE[dtype]
    config = read(tmp_path / "published" / "config.json")
    assert config["target_pos"] == [sorted(rows) for rows in ROWS]
    assert config["architectures"] == ["LoKILlamaForCausalLM"]
    assert read_positions(tmp_path / "published" / "target_pos.json") == config["target_pos"]
    # Put together it is what merging gives.
    convert(tmp_path / "published", tmp_path / "plain", to="plain", progress=False)
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    same_bits(plain.state_dict(), model.merge_and_unload().state_dict())


@pytest.mark.parametrize("rows", (ROWS, [[0], list(range(16))], [list(range(8, 16)), [15]]), ids=str)
def test_loki_round_trip_keeps_every_bit(tmp_path, rows):
    """With a layer all of whose rows are trained, NaN, and the base in a wider dtype."""
    tiny_llama(torch.bfloat16, bias=True).save_pretrained(tmp_path / "base")
    tiny_llama(torch.bfloat16, bias=True).float().save_pretrained(tmp_path / "wide")
    published = split_model(tiny_llama(torch.bfloat16, bias=True), rows=rows)
    published.model.layers[0].mlp.down_proj.active.weight.data[0, 3] = torch.nan
    source = save_split(tmp_path / "published", published, rows=rows)
    for base in ("base", "wide"):
        convert(source, tmp_path / f"ours {base}", base=tmp_path / base, progress=False)
    name = "model.safetensors"
    convert(tmp_path / "ours base", tmp_path / "again", base=tmp_path / "base", progress=False)
    same_bits(load_file(tmp_path / "again" / name), load_file(source / name))
    convert(tmp_path / "again", tmp_path / "ours again", base=tmp_path / "base", progress=False)
    ours = load_file(tmp_path / "ours base" / "adapter_model.safetensors")
    same_bits(load_file(tmp_path / "ours again" / "adapter_model.safetensors"), ours)
    same_bits(load_file(tmp_path / "ours wide" / "adapter_model.safetensors"), ours)


def test_rows_are_rounded_to_the_base_and_said_to_be(tmp_path):
    our_loki(tmp_path / "ours")
    tiny_llama(bias=True).bfloat16().save_pretrained(tmp_path / "base")
    done = convert(tmp_path / "ours", tmp_path / "published", base=tmp_path / "base", progress=False)
    assert done.notes == ("the rows were rounded to the base model's dtype",)
    weights = load_file(tmp_path / "published" / "model.safetensors")
    assert {tensor.dtype for name, tensor in weights.items() if "index_map" not in name} == {torch.bfloat16}


def test_positions_that_the_checkpoint_does_not_say(split, tmp_path):
    """The published file lists rows in the order of how often they were named."""
    path = split / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.0.mlp.down_proj.index_map"]
    save_file(weights, path, {"format": "pt"})
    edit(split / "config.json", target_pos=None)
    refused(split, tmp_path, path.name, "does not say which rows of model.layers.0.mlp.down_proj are trained")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    done = convert(split, tmp_path / "ours", positions=tmp_path / "rows.json", progress=False)
    assert "nothing was compared" in done.notes[0]
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert ours["base_model.model.model.layers.0.mlp.down_proj.loki_positions"].tolist() == sorted(ROWS[0])
    for rows in ([[1, 2], []], [[2, 5, 16], []]):
        write_positions(rows, tmp_path / "rows.json")
        refused(split, tmp_path, "rows.json", "of which 3 of 16 are trained", positions=tmp_path / "rows.json")


def test_a_low_rank_change_is_added_as_merging_adds_it(tmp_path):
    """In float32, and rounded once."""
    base = tiny_llama(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    model = our_loki(tmp_path / "ours", torch.bfloat16, bias=False, r=3, positions=[list(range(16)), [1]])
    convert(tmp_path / "ours", tmp_path / "published", base=tmp_path / "base", progress=False)
    convert(tmp_path / "published", tmp_path / "plain", to="plain", progress=False)
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    same_bits(plain.state_dict(), model.merge_and_unload().state_dict())


def test_nan_is_equal_to_itself(split, tmp_path):
    for folder, name in ((split, DOWN + "frozen.weight"), (tmp_path / "base", DOWN + "weight")):
        _tensors(lambda w, name=name: w[name][0, 0].fill_(torch.nan))(folder)
    convert(split, tmp_path / "ours", base=tmp_path / "base", progress=False)


def test_a_tied_model_saves_its_head_once(tmp_path):
    tiny_llama(tied=True).save_pretrained(tmp_path / "base")
    source = save_split(tmp_path / "published", split_model(tiny_llama(tied=True)))
    convert(source, tmp_path / "ours", base=tmp_path / "base", progress=False)
    _tensors(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))(source)
    convert(source, tmp_path / "again", base=tmp_path / "base", progress=False)


DOWN = "model.layers.0.mlp.down_proj."


def _tensors(change):
    def fault(source):
        weights = load_file(source / "model.safetensors")
        change(weights)
        save_file(weights, source / "model.safetensors", {"format": "pt"})

    return fault


def _swap_rows(weights):
    weights[DOWN + "index_map"][:2] = weights[DOWN + "index_map"][:2].flip(0)


LOKI_FAULTS = {
    "lacks the frozen rows of": _tensors(lambda w: w.pop(DOWN + "frozen.weight")),
    "lacks the active rows of": _tensors(
        lambda w: w.update({DOWN.replace("0", "1") + "frozen.weight": w[DOWN + "frozen.weight"].clone()})
    ),
    "holds the bias of some rows of": _tensors(lambda w: w.pop(DOWN + "frozen_bias")),
    "holds both .*active.weight and .*active_weight|holds both .*active_weight and .*active.weight": _tensors(
        lambda w: w.update({DOWN + "active_weight": w[DOWN + "active.weight"].clone()})
    ),
    "beside its parts": _tensors(lambda w: w.update({DOWN + "weight": torch.zeros(16, 24)})),
    "which are not rows of one layer": _tensors(lambda w: w.update({DOWN + "active.weight": torch.zeros(3, 23)})),
    r"index_map has shape \[15\]": _tensors(lambda w: w.update({DOWN + "index_map": torch.arange(15)})),
    "index_map is torch.int32": _tensors(lambda w: w.update({DOWN + "index_map": torch.arange(16, dtype=torch.int32)})),
    r"active_bias has shape \[4\]": _tensors(lambda w: w.update({DOWN + "active_bias": torch.zeros(4)})),
    "frozen.weight is torch.float64": _tensors(
        lambda w: w.update({DOWN + "frozen.weight": w[DOWN + "frozen.weight"].double()})
    ),
    "does not say of each row where it stands": _tensors(lambda w: w[DOWN + "index_map"].zero_()),
    "does not say of each row where it stands ": _tensors(_swap_rows),
    "are not those that .*target_pos names": lambda source: edit(source / "config.json", target_pos=[[5, 2, 10], []]),
    "lacks layer 1's rows, which": lambda source: edit(source / "config.json", target_pos=[[2, 5, 11], [3]]),
    "target_pos must be a list of row indices": lambda source: edit(source / "config.json", target_pos=[[True]]),
    "architectures must be": lambda source: edit(source / "config.json", architectures="Llama"),
    "config.json is damaged, or no JSON": lambda source: cut(source / "config.json"),
    "config.json must hold a JSON object": lambda source: (source / "config.json").write_text("[]"),
    "config.json cannot be read: No such file": lambda source: (source / "config.json").unlink(),
    "model.safetensors is damaged": lambda source: cut(source / "model.safetensors"),
    "model.safetensors is damaged ": lambda source: flip(source / "model.safetensors", 0),
}


def test_a_model_that_was_never_trained_has_no_split_layers(tmp_path):
    """Its authors save it so."""
    source = save_split(tmp_path / "published", tiny_llama())
    assert recognise(source) is formats.PLAIN
    with pytest.raises(ConvertError, match="has no layers of the published LoKI; an untrained model has none"):
        loki_merge_published(source, tmp_path / "plain", progress=False)
    source = save_split(tmp_path / "no rows", split_model(tiny_llama(), "plain", [[], []]), "plain", [[], []])
    refused(source, tmp_path, "model.safetensors", "has no trained rows")


@pytest.mark.parametrize("reason", LOKI_FAULTS)
def test_loki_errors(split, tmp_path, reason):
    LOKI_FAULTS[reason](split)
    file = "config.json" if "config.json" in reason or "target_pos" in reason or "arch" in reason else "model.safet"
    refused(split, tmp_path, file, reason.strip(), to="plain")


BASE_FAULTS = {
    "lacks model.norm.weight, which": _tensors(lambda w: w.pop("model.norm.weight")),
    "lacks model.extra.weight, which": _tensors(lambda w: w.update({"model.extra.weight": torch.zeros(1)})),
    "lm_head.weight is not what": _tensors(lambda w: w["lm_head.weight"][0, 0].add_(1e-3)),
    "frozen.weight is not what": _tensors(lambda w: w[DOWN + "weight"][0, 0].add_(1e-3)),
    "frozen_bias is not what": _tensors(lambda w: w[DOWN + "bias"][15].add_(1)),
    "frozen.weight is not what ": _tensors(lambda w: w.update({DOWN + "weight": torch.zeros(17, 24)})),
}


@pytest.mark.parametrize("reason", BASE_FAULTS)
def test_more_than_the_rows_differs_from_the_base(split, tmp_path, reason):
    BASE_FAULTS[reason](tmp_path / "base")
    refused(split, tmp_path, "model.safetensors", reason.strip(), base=tmp_path / "base")


def test_the_base_s_own_values_of_trained_rows_do_not_matter(split, tmp_path):
    _tensors(lambda w: w[DOWN + "weight"][5].zero_())(tmp_path / "base")
    convert(split, tmp_path / "ours", base=tmp_path / "base", progress=False)


@pytest.mark.parametrize("fault", ("gone", "cut", "lacks", "extra", "index", "path"))
def test_shards_that_do_not_fit_their_index(tmp_path, fault):
    source = save_split(tmp_path / "published", split_model(tiny_llama()), max_shard_size="5KB")
    index = source / "model.safetensors.index.json"
    shards = read(index)["weight_map"]
    shard = source / shards["model.norm.weight"]
    reason = {
        "gone": "does not exist", "cut": "is damaged", "lacks": "lacks model.norm.weight, which",
        "extra": "holds model.norm.weight, which", "index": "must have a weight_map", "path": "must have a weight_map",
    }[fault]  # fmt: skip
    file = shard.name
    if fault == "gone":
        shard.unlink()
    elif fault == "cut":
        cut(shard)
    elif fault == "lacks":
        weights = load_file(shard)
        save_file({n: t for n, t in weights.items() if n != "model.norm.weight"}, shard)
    elif fault == "extra":
        edit(index, weight_map={n: f for n, f in shards.items() if n != "model.norm.weight"})
    else:
        file = index.name
        edit(index, weight_map={"a": f"../{shard.name}"} if fault == "path" else ["a"])
    refused(source, tmp_path, file, reason)


ADAPTER_KEY = "base_model.model." + DOWN


def _adapter(change):
    def fault(folder):
        path = folder / "ours" / "adapter_model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)

    return fault


def _our_config(**changes):
    return lambda folder: edit(folder / "ours" / "adapter_config.json", **changes)


OUR_LOKI_FAULTS = {
    "lacks .*down_proj.loki_active: it does not fit the base": _adapter(lambda w: w.pop(ADAPTER_KEY + "loki_active")),
    "lacks .*loki_active_bias: it does not fit": _adapter(lambda w: w.pop(ADAPTER_KEY + "loki_active_bias")),
    "lacks .*loki_positions: it does not fit": _adapter(lambda w: w.pop(ADAPTER_KEY + "loki_positions")),
    "holds .*loki_A: it does not fit": _adapter(lambda w: w.update({ADAPTER_KEY + "loki_A": torch.zeros(1)})),
    "which is no part of this LoKI adapter": _adapter(lambda w: w.update({"loki_A": torch.zeros(1)})),
    r"loki_active has shape \[3, 25\], it must be \[3, 24\] to fit the base model": _adapter(
        lambda w: w.update({ADAPTER_KEY + "loki_active": torch.zeros(3, 25)})
    ),
    "must be rows from 0 to 15": _adapter(lambda w: w[ADAPTER_KEY + "loki_positions"].add_(8)),
    "must be ascending int64": _adapter(lambda w: w.update({ADAPTER_KEY + "loki_positions": torch.tensor([5, 2, 11])})),
    "must be ascending int64 ": _adapter(
        lambda w: w.update({ADAPTER_KEY + "loki_positions": torch.tensor([2.0, 5.0, 11.0])})
    ),
    "rows must be a number of rows": _our_config(rows=[3]),
    "modules_to_save: a published LoKI model": _our_config(modules_to_save=["lm_head"]),
    "has later, which this version": _our_config(later=3),
    "lora_alpha must be a number": _our_config(lora_alpha="high"),
    "num_hidden_layers must be a number": lambda folder: edit(folder / "base" / "config.json", num_hidden_layers="2"),
    "the base model has 0 layers|num_hidden_layers": lambda f: edit(f / "base" / "config.json", num_hidden_layers=0),
    "has no weight model.layers.0.mlp.down_proj.weight": lambda folder: _tensors(lambda w: w.pop(DOWN + "weight"))(
        folder / "base"
    ),
}


@pytest.mark.parametrize("reason", OUR_LOKI_FAULTS)
def test_our_loki_errors(tmp_path, reason):
    our_loki(tmp_path / "ours")
    tiny_llama(bias=True).save_pretrained(tmp_path / "base")
    OUR_LOKI_FAULTS[reason](tmp_path)
    refused(tmp_path / "ours", tmp_path, "", reason.strip(), base=tmp_path / "base")


def test_published_layers_are_down_projections_of_the_base_s_layers(tmp_path):
    tiny_llama(bias=True).save_pretrained(tmp_path / "base")
    our_loki(tmp_path / "ours", positions={"layers.0.mlp.up_proj": [3]})
    refused(tmp_path / "ours", tmp_path, "adapter_model", "adapts model.layers.0.mlp.up_proj; the published LoKI",
            base=tmp_path / "base")  # fmt: skip
    our_loki(tmp_path / "second", positions={1: [3]})
    edit(tmp_path / "base" / "config.json", num_hidden_layers=1)
    refused(tmp_path / "second", tmp_path, "adapter_model", "the base model has 1 layers", base=tmp_path / "base")
