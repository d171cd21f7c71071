"""What conversion does whatever it converts: what it recognises and refuses, how it writes, and the command."""

import json
import os

import published_layers
import pytest
import torch
from published_layers import ROWS, our_loki, refused, same_bits
from safetensors.torch import load_file

from gci_kernels.cli import main
from gci_kernels.convert import ConvertError, conversions, convert, files, formats, loki, loramoe, recognise

pytestmark = pytest.mark.usefixtures("one_thread")


moe = published_layers.moe
split = published_layers.split


def test_what_is_no_checkpoint(moe, split, tmp_path):
    refused(tmp_path / "none", tmp_path, "none", "does not exist")
    refused(moe / "tokenizer.json", tmp_path, "tokenizer.json", "is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "empty", "holds none of adapter_config.json, model.safetensors and")
    refused(tmp_path / "base", tmp_path, "base", "is a plain model, which can become nothing else")


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("OTHER", "says peft_type='OTHER', which no registered method has: import the module that registers it"),
        (None, "says peft_type=None, which no registered method has"),
        (["LORA"], r"says peft_type=\['LORA'\], which no registered method has"),
        ("IA3", "'IA3' has no published format; what can be converted is .*a GCI_LORAMOE adapter"),
        ("gci_kernels.GCI_ALORA", "'gci_kernels.GCI_ALORA' has no published format"),
    ],
)
def test_an_adapter_of_another_method(tmp_path, method, reason):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps({"peft_type": method}))
    refused(tmp_path / "other", tmp_path, "adapter_config.json", reason)


def test_every_format_is_known_by_its_own_files(moe, split, tmp_path):
    """Of each format there is a conversion's result, and that and no other is recognised in it."""
    convert(moe, tmp_path / "moe ours", progress=False)
    convert(split, tmp_path / "loki ours", progress=False)
    for folder, expected in (
        ("moe", loramoe.PUBLISHED), ("moe ours", loramoe.OURS), ("loki", loki.PUBLISHED), ("loki ours", loki.OURS),
        ("base", formats.PLAIN),
    ):  # fmt: skip
        assert recognise(tmp_path / folder) is expected
    assert {each.description for each in conversions.FORMATS} == {
        "an adapter of the published LoRAMoE", "a GCI_LORAMOE adapter", "a model of the published LoKI",
        "a GCI_LOKI adapter", "a plain model",
    }  # fmt: skip


def test_what_it_cannot_become(moe, split, tmp_path):
    our_loki(tmp_path / "ours")
    for source, options, reason in (
        (moe, dict(to="published"), "can become ours, not published"),
        (moe, dict(to="plain"), "can become ours, not plain"),
        (moe, dict(base=split), "base is not used"),
        (moe, dict(positions="rows.json"), "positions is not used"),
        (split, dict(to="published"), "can become ours or plain, not published"),
        (split, dict(to="plain", base=tmp_path / "base"), "base is not used"),
        (tmp_path / "ours", {}, "give base"),
    ):
        refused(source, tmp_path, source.name, reason, **options)


@pytest.mark.parametrize("there", ("file", "full", "empty", "orphan"))
def test_a_target_that_is_there(moe, tmp_path, there):
    target = tmp_path / "target"
    if there == "file":
        target.write_text("mine")
    elif there == "orphan":
        with pytest.raises(ConvertError, match="its folder does not exist"):
            convert(moe, target / "deeper", progress=False)
        return
    else:
        target.mkdir()
    if there == "full":
        (target / "mine").write_text("mine")
    if there == "empty":
        convert(moe, target, progress=False)
        assert recognise(target) is loramoe.OURS
        return
    refused(moe, tmp_path, "target", "is there already")


@pytest.mark.parametrize("error", (KeyboardInterrupt, OSError))
def test_a_run_that_ends_early_leaves_nothing(split, tmp_path, monkeypatch, error):
    seen = []

    def failing(path, plan, advance):
        path.write_bytes(b"half")
        seen.append((tmp_path / "target").exists())
        raise error

    monkeypatch.setattr(files, "write_safetensors", failing)
    before = sorted(os.listdir(tmp_path))
    for to in ("ours", "plain"):
        with pytest.raises(error):
            convert(split, tmp_path / "target", to=to, progress=False)
        assert sorted(os.listdir(tmp_path)) == before
    assert seen == [False, False]


def test_weights_are_written_one_tensor_at_a_time(split, tmp_path, monkeypatch):
    """Nothing but the tensor on its way is made."""
    alive, most = set(), []
    real = files._write_values

    def watched(file, tensor):
        alive.add(id(tensor))
        most.append(len(alive))
        real(file, tensor)
        alive.clear()

    monkeypatch.setattr(files, "_write_values", watched)
    convert(split, tmp_path / "plain", to="plain", progress=False)
    assert max(most) == 1 and len(most) == len(load_file(tmp_path / "plain" / "model.safetensors"))


def test_widths_of_values_never_put_a_tensor_askew(tmp_path):
    plan = {name: files.LazyTensor.of(tensor) for name, tensor in {
        "a": torch.tensor([True, False, True]), "b": torch.randn(3), "c": torch.randn(1, 5).half(),
        "d": torch.tensor(3.0, dtype=torch.float64), "e": torch.empty(0, 4), "f": torch.arange(6).view(2, 3).t(),
    }.items()}  # fmt: skip
    files.write_safetensors(tmp_path / "file", plan, lambda count: None)
    data = (tmp_path / "file").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert all(header[name]["data_offsets"][0] % lazy.dtype.itemsize == 0 for name, lazy in plan.items())
    same_bits(load_file(tmp_path / "file"), {name: lazy.make().contiguous() for name, lazy in plan.items()})


@pytest.mark.smoke
def test_command(moe, split, tmp_path, capsys):
    assert main(["convert", str(moe), str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{moe}: an adapter of the published LoRAMoE", f"{tmp_path}/ours: a GCI_LORAMOE adapter, 6 modules"]
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "published"]) == 0
    assert recognise(tmp_path / "back") is loramoe.PUBLISHED
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    base, rows = ["--base", str(tmp_path / "base")], ["--positions", str(tmp_path / "rows.json")]
    assert main(["convert", str(split), str(tmp_path / "rows"), *base, *rows]) == 0
    assert main(["convert", str(tmp_path / "loki"), str(tmp_path / "split"), *base]) == 0
    assert main(["convert", str(split), str(tmp_path / "plain"), "--to", "plain"]) == 0
    assert recognise(tmp_path / "plain") is formats.PLAIN
    capsys.readouterr()
    assert main(["convert", str(split), str(tmp_path / "unchecked")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("note: nothing was compared")
    assert main(["convert", str(moe), str(tmp_path / "ours")]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"{tmp_path}/ours is there already: choose another name, or an empty folder\n"


def test_functions_take_strings_and_show_a_bar_on_stderr(split, tmp_path, capsys):
    capsys.readouterr()
    loki.loki_from_published(str(split), str(tmp_path / "ours"), base=str(tmp_path / "base"))
    out, err = capsys.readouterr()
    assert out == "" and "comparing with the base" in err and "writing rows" in err
