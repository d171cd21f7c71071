"""LoKI's rows merged into the base weight, and several adapters on one layer."""

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn
from toy_loki import IDS, adapted, assert_same, config, logits, loki_layers, plain, restated

from gci_kernels.accuracy import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


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
    base = first.base_layer.weight.detach().clone()
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(first.base_layer.weight, base), "not a number is no change that somebody made meanwhile"
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
