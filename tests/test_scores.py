"""Files of scores: a killed run goes on, what is not ours stays untouched; both layouts; the two commands."""

import json
import struct
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gci_kernels.accuracy import relative_error
from gci_kernels.cli import main
from gci_kernels.loki import ScoresError, attribute, attribute_file, files, load_scores, read_positions, select
from gci_kernels.models.model_state import fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLES = [list(range(3, 3 + length)) for length in (5, 8, 3, 6, 7)]


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


class Killed(BaseException):
    pass


def kill_after(count):
    def after(finished):
        if finished >= count:
            raise Killed

    return after


@pytest.fixture
def attributed(monkeypatch):
    """How many samples each call of `attribute` by a file had."""
    calls = []

    def spy(model, ids, mask, **options):
        calls.append(len(ids))
        return attribute(model, ids, mask, **options)

    monkeypatch.setattr(files, "attribute", spy)
    return calls


def expected(model, **options):
    return torch.cat([attribute(model, torch.tensor([sample]), **options) for sample in SAMPLES])


def test_holds_what_attribute_gives(model, tmp_path):
    path = tmp_path / "scores.safetensors"
    attribute_file(model, SAMPLES, path, batch=2, progress=False)
    assert relative_error(load_scores(path), expected(model)) < 1e-4
    assert torch.equal(load_file(path)["scores"], load_scores(path))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["scores.safetensors", "scores.h5"])
@pytest.mark.parametrize("path", ["last_position", "all_positions"])
def test_a_killed_run_goes_on(model, tmp_path, attributed, name, path):
    if name.endswith(".h5"):
        pytest.importorskip("h5py")
    out = tmp_path / name
    options = {"path": path, "steps": 3, "batch": 2, "progress": False}
    with pytest.raises(Killed):
        attribute_file(model, SAMPLES, out, **options, after=kill_after(2))
    with pytest.raises(Killed):
        attribute_file(model, SAMPLES, out, **options, after=kill_after(4))
    with pytest.raises(ScoresError, match="1 of 5 samples are missing|does not exist"):
        load_scores(out)
    attribute_file(model, SAMPLES, out, **options)
    attribute_file(model, SAMPLES, out, **options)  # nothing is left to do
    assert attributed == [2, 2, 1]
    assert relative_error(load_scores(out), expected(model, path=path, steps=3)) < 1e-4
    assert list(tmp_path.iterdir()) == [out]


def test_a_sample_cut_short_is_missing(model, tmp_path, attributed):
    """Killed between a sample's scores and its checksum: the sample is computed again."""
    out = tmp_path / "scores.safetensors"
    attribute_file(model, SAMPLES, out, progress=False)
    whole = out.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    out.write_bytes(whole[: start + 16] + struct.pack("<q", -1) + whole[start + 24 : -300] + b"\1" * 300)
    with pytest.raises(ScoresError, match="sample 4 doesn't match its checksum"):
        attribute_file(model, SAMPLES, out, progress=False)
    out.write_bytes(whole[: start + 16] + struct.pack("<q", -1) + whole[start + 24 :])
    attribute_file(model, SAMPLES, out, progress=False)
    assert attributed == [5, 1] and relative_error(load_scores(out), expected(model)) < 1e-4


def test_a_new_file_appears_whole_or_not_at_all(model, tmp_path, monkeypatch):
    # In place of the module, not of its function: the processes that run tests talk to one another through that.
    monkeypatch.setattr("gci_kernels.loki.scores.struct", types.SimpleNamespace(pack=lambda *_: 1 / 0))
    out = tmp_path / "scores.safetensors"
    with pytest.raises(ZeroDivisionError):
        attribute_file(model, SAMPLES, out, progress=False)
    assert not out.exists()


def other_weights(model):
    model.model.layers[1].mlp.down_proj.weight[:, ::3] += 1
    return {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, "another run's: it has model"),
        (lambda _: {"samples": SAMPLES[::-1]}, "another text as sample 0"),
        (lambda _: {"samples": SAMPLES[:3]}, r"shape \[5, 3, 32\], not \[3, 3, 32\]"),
        (lambda _: {"steps": 5}, "steps '7', not '5'"),
        (lambda _: {"path": "all_positions"}, "path 'last_position', not 'all_positions'"),
    ],
)
def test_another_runs_file_is_refused(model, tmp_path, change, message):
    out = tmp_path / "scores.safetensors"
    with pytest.raises(Killed):
        attribute_file(model, SAMPLES, out, progress=False, batch=1, after=kill_after(2))
    before = out.read_bytes()
    with pytest.raises(ScoresError, match=message):
        attribute_file(**{"model": model, "samples": SAMPLES, "out": out, "progress": False} | change(model))
    assert out.read_bytes() == before


def damage_tail(data):
    return data[:-100]


def damage_middle(data):
    return data[:-500] + bytes([data[-500] ^ 1]) + data[-499:]


@pytest.mark.parametrize("damage", [damage_tail, damage_middle, lambda data: data[:4], lambda data: b""])
def test_a_damaged_file_is_refused(model, tmp_path, damage):
    out = tmp_path / "scores.safetensors"
    attribute_file(model, SAMPLES, out, progress=False)
    out.write_bytes(damage(out.read_bytes()))
    before = out.read_bytes()
    for use in (load_scores, lambda out: attribute_file(model, SAMPLES, out, progress=False)):
        with pytest.raises(ScoresError, match="is damaged"):
            use(out)
    assert out.read_bytes() == before


def test_files_of_other_kinds_are_refused(model, tmp_path):
    out = tmp_path / "model.safetensors"
    save_file({"scores": torch.zeros(1, 3, 32)}, out)
    before = out.read_bytes()
    for use in (load_scores, lambda out: attribute_file(model, SAMPLES, out, progress=False)):
        with pytest.raises(ScoresError, match="no scores file of this version"):
            use(out)
    assert out.read_bytes() == before
    (tmp_path / "x.h5").write_bytes(b"HDF")
    pytest.importorskip("h5py")
    for use in (load_scores, lambda out: attribute_file(model, SAMPLES, out, progress=False)):
        with pytest.raises(ScoresError, match="is damaged, or no HDF5 file"):
            use(tmp_path / "x.h5")


def test_scores_that_are_not_finite_leave_the_file_valid(model, tmp_path):
    out = tmp_path / "scores.safetensors"
    model.model.embed_tokens.weight[9] = torch.nan  # a token of every sample but 0 and 2
    with pytest.raises(FloatingPointError):
        attribute_file(model, SAMPLES, out, batch=1, progress=False)
    tensors = load_file(out)
    assert (tensors["checksums"] != -1).tolist() == [True, False, False, False, False]
    assert tensors["scores"][0].isfinite().all() and tensors["scores"][1:].isnan().all()


@pytest.mark.parametrize("samples", [[], [[3, 4], []]])
def test_no_samples(model, tmp_path, samples):
    with pytest.raises(ValueError, match="at least one sequence"):
        attribute_file(model, samples, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_published_hdf5(model, tmp_path):
    h5py = pytest.importorskip("h5py")
    out = tmp_path / "kva.h5"
    attribute_file(model, SAMPLES, out, steps=4, progress=False)
    with h5py.File(out) as file:
        assert file["dataset"].shape == (5, 3, 32) and file["dataset"].dtype == "f4"
        assert file["dataset"].attrs["metadata_steps"] == "4"
    with pytest.raises(ScoresError, match="another run's"):
        attribute_file(model, SAMPLES, out, steps=5, progress=False)
    with h5py.File(tmp_path / "published.h5", "w") as file:
        file.create_dataset("dataset", data=load_scores(out).numpy(), dtype="f2", compression="gzip")
    assert relative_error(load_scores(tmp_path / "published.h5"), load_scores(out)) < 1e-3
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.create_dataset("scores", data=[1.0])
    with pytest.raises(ScoresError, match="no dataset"):
        load_scores(tmp_path / "other.h5")


@pytest.fixture
def folder(model, tmp_path):
    """A model with a tokenizer that knows the words w3, w4 ..."""
    vocabulary = {f"w{token}": token for token in range(3, 97)} | {"[UNK]": 2}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}w90"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.smoke
def test_commands(model, folder, tmp_path, capsys):
    text, out, positions, picture = (tmp_path / name for name in ("t.jsonl", "s.safetensors", "p.json", "p.png"))
    lines = [{"text": "w5 w6 w7 w8 w9"}, "w10 w11", {"messages": [{"role": "user", "content": "w12 w13"}]}, "w14"]
    text.write_text("\n\n".join(map(json.dumps, lines)))
    command = ["attribute", "--model", str(folder), "--text", str(text), "--out", str(out), "--device", "cpu"]
    assert main([*command, "--steps", "3", "--max-tokens", "4", "--limit", "3"]) == 0
    assert "scores of 3 samples" in capsys.readouterr().out
    for found, tokens in zip(load_scores(out), ([5, 6, 7, 8], [10, 11], [12, 13, 90]), strict=True):
        assert relative_error(found, attribute(model, torch.tensor([tokens]), steps=3)[0]) < 1e-4
    command = ["select", str(out), "--quota", "25", "--out", str(positions)]
    assert main([*command, "--plot", str(picture)]) == 0
    assert "24 of 96 rows in 3 layers, from 3 samples" in capsys.readouterr().out
    assert read_positions(positions) == select(load_scores(out), 25)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--strategy", "global_highest"]) == 0
    assert read_positions(positions) == select(load_scores(out), 25, "global_highest")


def test_a_text_files_lines_are_samples(folder, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("w5 w6\n\nw7\n")
    command = ["attribute", "--model", str(folder), "--text", str(tmp_path / "t.txt"), "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "s.safetensors"), "--dtype", "bfloat16"]) == 0
    assert load_scores(tmp_path / "s.safetensors").shape == (2, 3, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--text": "missing.txt"}, "No such file"),
        ({"--text": "empty.txt"}, "holds no text"),
        ({"--text": "bad.jsonl"}, "bad.jsonl:2: not JSON"),
        ({"--text": "numbers.jsonl"}, "numbers.jsonl:1: must be a string or an object"),
        ({"--out": "nowhere/s.safetensors"}, "its folder does not exist"),
        ({"--out": "bad.jsonl"}, "is damaged, or no safetensors file"),
        ({"--model": "random-llama"}, "has no tokenizer"),
        ({"--model": "./missing"}, "neither smollm2"),
    ],
)
def test_attribute_says_what_is_wrong(folder, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("w5 w6\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('"w5"\n{"text": }\n')
    (tmp_path / "numbers.jsonl").write_text("5\n")
    options = {"--model": str(folder), "--text": "t.txt", "--out": "s.safetensors", "--device": "cpu"} | change
    assert main(["attribute", *(part for option in options.items() for part in option)]) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_select_says_what_is_wrong(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Killed):
        attribute_file(model, SAMPLES, "s.safetensors", batch=1, progress=False, after=kill_after(2))
    for arguments, message in (
        (["s.safetensors", "--quota", "10"], "3 of 5 samples are missing"),
        (["none.safetensors", "--quota", "10"], "does not exist"),
        (["s.safetensors", "--quota", "10", "--plot", "nowhere/p.png"], "its folder does not exist"),
    ):
        assert main(["select", *arguments, "--out", "p.json"]) == 1
        assert message in capsys.readouterr().err.replace("\n", " ")
    attribute_file(model, SAMPLES, "s.safetensors", progress=False)
    assert main(["select", "s.safetensors", "--quota", "101", "--out", "p.json"]) == 1
    assert "at most 100 percent" in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


def test_same_samples_from_tensors(model, tmp_path, attributed):
    tensors = [torch.randint(3, 97, (length,)) for length in (4, 6)]
    attribute_file(model, tensors, tmp_path / "s.safetensors", progress=False)
    attribute_file(model, [sample.tolist() for sample in tensors], tmp_path / "s.safetensors", progress=False)
    assert attributed == [2]


def test_a_fingerprint_reads_the_last_value_of_an_embedding_of_any_size():
    model = nn.Module()
    model.register_buffer("embedding", torch.zeros(28_311_552, dtype=torch.int8))  # more than float32 counts evenly
    before = fingerprint(model)
    model.embedding[-1] = 1
    assert fingerprint(model) != before
