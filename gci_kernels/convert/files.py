"""The files of checkpoints: reading names the file and the fault, writing leaves nothing incomplete."""

import contextlib
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gci_kernels.progress import bar

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Files that are copied along with the weights.
_COMPANIONS = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab.*|merges\.txt|chat_template.*|generation_config\.json"
)
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class ConvertError(ValueError):
    """A checkpoint that is damaged, incomplete, or cannot be converted. The message names the file and the reason."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ConvertError where the file cannot be read or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path} is damaged, or no JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ConvertError(f"{path} must hold a JSON object, it holds a {type(found).__name__}")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as JSON, its names sorted."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote, on the CPU, of any shape; no code in it is run.

    Raises:
        ConvertError: it is damaged, or holds anything but floating-point tensors by name.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:
                broken = parts.testzip()
            if broken is not None:
                raise ConvertError(f"{path} is damaged: its part {broken} does not match its checksum")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except ConvertError:
        raise
    except Exception as error:  # of many types, by what is damaged
        # torch.load wraps the cause into advice how to load the file nevertheless.
        cause = error.__context__ if isinstance(error, pickle.UnpicklingError) and error.__context__ else error
        reason = str(cause).partition("\n")[0].partition(" Please ")[0] or type(cause).__name__
        raise ConvertError(f"{path} is damaged, or holds other things than tensors: {reason}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ConvertError(f"{path} must hold tensors by name, it holds a {type(found).__name__}")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise ConvertError(f"{path}: {name} is no tensor, it is a {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.dtype not in _FLOATS or tensor.device.type != "cpu":
            raise ConvertError(f"{path}: {name} must be a dense tensor of 16, 32 or 64-bit floating-point numbers")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ConvertError(f"{path} is damaged: {name} has shape {list(tensor.shape)}, and fewer values")
    return {name: tensor.detach() for name, tensor in found.items()}


class Checkpoint:
    """The tensors of a safetensors file, or of several with an index, by name. They are memory-mapped.

    Args:
        folder: holds the file `name`, or else shards and their index.
        name: the single file's.

    Attributes:
        files: the opened files by their names.

    Raises:
        ConvertError: a file is missing or damaged, or the index does not fit the shards.
    """

    def __init__(self, folder: Path, name: str = MODEL) -> None:
        self.folder, index = folder, folder / INDEX
        self.sharded = not (folder / name).is_file() and name == MODEL and index.is_file()
        self.path = index if self.sharded else folder / name
        self._where: dict[str, str] = _weight_map(index) if self.sharded else {}
        self.files = {file: _open(folder / file) for file in (sorted(set(self._where.values())) or [name])}
        present = {tensor: file for file, opened in self.files.items() for tensor in opened.keys()}
        for tensor, file in self._where.items():
            if tensor not in self.files[file].keys():
                raise ConvertError(f"{folder / file} lacks {tensor}, which {INDEX} says is there")
        if self.sharded and present.keys() != self._where.keys():
            extra = min(present.keys() - self._where.keys())
            raise ConvertError(f"{folder / present[extra]} holds {extra}, which {INDEX} does not name")
        self._where = self._where or present

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._where))

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> Tensor:
        """A view of the mapped file."""
        try:
            return self.files[self._where[name]].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ConvertError(f"{self.file(name)}: {name} cannot be read ({error})") from error

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.folder / self._where[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading its values."""
        return tuple(self.files[self._where[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, without reading its values; ConvertError for one that PyTorch has not."""
        code = self.files[self._where[name]].get_slice(name).get_dtype()
        if code not in _DTYPES:
            raise ConvertError(f"{self.file(name)}: {name} has dtype {code}; known: {', '.join(_DTYPES)}")
        return _DTYPES[code]

    def nbytes(self, name: str) -> int:
        """The size of a tensor's values."""
        return self.lazy(name).nbytes

    def lazy(self, name: str) -> "LazyTensor":
        """A tensor, to be written unchanged."""
        return LazyTensor(self.dtype(name), self.shape(name), lambda: self[name])


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    files = found.values() if isinstance(found, dict) else ()
    if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise ConvertError(f"{index} must have a weight_map from tensors to files beside it")
    assert isinstance(found, dict)
    return found


def _open(path: Path) -> Any:  # safetensors has no type for it
    if not path.is_file():
        raise ConvertError(f"{path} does not exist")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ConvertError(f"{path} is damaged, or no safetensors file ({error})") from error


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written; `make` computes it on the CPU, so that one is in memory at a time."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        """A tensor that is in memory already."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        """The size of its values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


#: The tensors of a file that is going to be written, by name.
Plan = Mapping[str, LazyTensor]


def write_safetensors(path: Path, plan: Plan, advance: Callable[[int], None]) -> None:
    """Writes a safetensors file, one tensor in memory at a time; `advance` is called with the bytes of each."""
    # The widest dtypes first: every tensor then begins at a multiple of its dtype's size, as readers need it.
    names = sorted(plan, key=lambda name: (-plan[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + plan[name].nbytes
        header[name] = {
            "dtype": _CODES[plan[name].dtype], "shape": plan[name].shape, "data_offsets": [start, end],
        }  # fmt: skip
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            _write_values(file, plan[name].make())
            advance(plan[name].nbytes)


def _write_values(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_model(folder: Path, source: Checkpoint, replaced: Mapping[str, Plan], text: str, progress: bool) -> None:
    """Writes a model's weights in the shards of `source`, with some tensors replaced by others (or by none)."""
    plans: dict[str, dict[str, LazyTensor]] = {file: {} for file in source.files}
    for name in source:
        plans[source.file(name).name] |= replaced.get(name, {name: source.lazy(name)})
    total = sum(tensor.nbytes for plan in plans.values() for tensor in plan.values())
    with bar(text, total, in_bytes=True, shown=progress) as shown:
        for file, plan in plans.items():
            write_safetensors(folder / file, plan, shown.advance)
    if source.sharded:
        where = {name: file for file, plan in plans.items() for name in plan}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder to write into, renamed to `target` at the end; after an error it is removed.

    Raises:
        ConvertError: `target` exists and is not an empty folder, or its parent does not exist.
    """
    check_target(target)
    target = Path(os.path.abspath(target))
    scratch = target.with_name(f".{target.name}.{os.getpid()}.partial")
    scratch.mkdir()
    try:
        yield scratch
        if target.exists():
            target.rmdir()
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_target(target: Path) -> None:
    """ConvertError where `target` exists and is not an empty folder, or its parent does not exist."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConvertError(f"{target} is there already: choose another name, or an empty folder")
    if not target.absolute().parent.is_dir():
        raise ConvertError(f"{target}: its folder does not exist")


def copy_companions(source: Path, folder: Path) -> None:
    """Copies the tokenizer, the chat template and the like, where `source` has them."""
    for path in source.iterdir():
        if path.is_file() and _COMPANIONS.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
