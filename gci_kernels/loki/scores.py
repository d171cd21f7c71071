"""Files of scores: safetensors that stay valid while they grow, and HDF5 in the published layout.

Our layout holds `scores` [samples, layers, out] float32, and for each sample `texts`, a digest of its tokens, and
`checksums`, the CRC-32 of its scores, or -1 while they are missing. The file has its full size from the start, with NaN
for what is missing. A sample's checksum is written after its scores, so after a kill each sample is either complete
or missing.
"""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT = "gci_kernels.loki.scores 1"
HDF5_SUFFIXES = (".h5", ".hdf5")
MISSING = -1


class ScoresError(ValueError):
    """A scores file that is damaged, unfinished, or another run's. Its message names the file and what to do."""


def digest(tokens: Sequence[int]) -> int:
    """63 bits that tell one sample's token ids from another's."""
    text = json.dumps([int(token) for token in tokens]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


class ScoresFile:
    """A scores file in our layout, open for writing. Use as a context manager.

    Args:
        path: the file; continued where it is there and was made by the same run, else created.
        texts: a digest for each sample.
        shape: layers, out.
        settings: what else the scores depend on; a file made with other settings is refused.

    Raises:
        ScoresError: the file is there and is no scores file, is damaged, or is another run's. It stays as it is.
    """

    def __init__(self, path: Path, texts: Sequence[int], shape: tuple[int, int], settings: dict[str, str]) -> None:
        self.path, self.shape = path, (len(texts), *shape)
        if path.exists():
            self.checksums = _check_same(path, texts, self.shape, settings)
        else:
            _create(path, texts, self.shape, settings)
            self.checksums = np.full(len(texts), MISSING, dtype="<i8")
        self._file = path.open("r+b")
        self._start = 8 + struct.unpack("<Q", self._file.read(8))[0]

    def __enter__(self) -> "ScoresFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def missing(self) -> list[int]:
        """The numbers of the samples that have no scores yet."""
        return np.flatnonzero(self.checksums == MISSING).tolist()

    def write(self, sample: int, scores: Tensor) -> None:
        """Write one sample's scores [layers, out], any device, as float32."""
        if tuple(scores.shape) != self.shape[1:]:
            raise ValueError(f"scores must be {list(self.shape[1:])}, got {list(scores.shape)}")
        data = scores.detach().to("cpu", torch.float32).numpy().astype("<f4").tobytes()
        samples = self.shape[0]
        self._put(16 * samples + sample * len(data), data)
        self.checksums[sample] = zlib.crc32(data)
        self._put(8 * sample, self.checksums[sample : sample + 1].tobytes())

    def _put(self, offset: int, data: bytes) -> None:
        self._file.seek(self._start + offset)
        self._file.write(data)
        self._file.flush()


def _create(path: Path, texts: Sequence[int], shape: tuple[int, int, int], settings: dict[str, str]) -> None:
    samples, layers, out = shape
    row = 4 * layers * out
    header = {
        "__metadata__": {"format": FORMAT, **settings},
        "checksums": {"dtype": "I64", "shape": [samples], "data_offsets": [0, 8 * samples]},
        "texts": {"dtype": "I64", "shape": [samples], "data_offsets": [8 * samples, 16 * samples]},
        "scores": {"dtype": "F32", "shape": shape, "data_offsets": [16 * samples, 16 * samples + samples * row]},
    }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    nothing = np.full(layers * out, np.nan, dtype="<f4").tobytes()
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.write(np.full(samples, MISSING, dtype="<i8").tobytes())
        file.write(np.asarray(texts, dtype="<i8").tobytes())
        for _ in range(samples):
            file.write(nothing)
    scratch.replace(path)


def _read(path: Path) -> tuple[dict[str, str], np.ndarray, np.ndarray, Tensor]:
    """Settings, checksums, digests and scores of a file in our layout; every finished sample matches its checksum."""
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            if metadata.pop("format", None) != FORMAT or set(file.keys()) != {"checksums", "texts", "scores"}:
                raise ScoresError(f"{path} is no scores file of this version")
            checksums, texts, scores = (file.get_tensor(name) for name in ("checksums", "texts", "scores"))
    except SafetensorError as error:
        raise ScoresError(f"{path} is damaged, or no safetensors file ({error}): delete it to begin again") from error
    checksums, texts = checksums.numpy().copy(), texts.numpy()
    for sample in np.flatnonzero(checksums != MISSING):
        if zlib.crc32(scores[sample].numpy().tobytes()) != checksums[sample]:
            raise ScoresError(
                f"{path} is damaged: sample {sample} doesn't match its checksum; delete it to begin again"
            )
    return metadata, checksums, texts, scores


def _check_same(path: Path, texts: Sequence[int], shape: tuple[int, ...], settings: dict[str, str]) -> np.ndarray:
    """The checksums in a file that this run may continue."""
    found, checksums, found_texts, scores = _read(path)
    other = [
        f"{name} {found.get(name)!r}, not {value!r}" for name, value in settings.items() if found.get(name) != value
    ]
    if tuple(scores.shape) != shape:
        other.append(f"shape {list(scores.shape)}, not {list(shape)}")
    elif (found_texts != np.asarray(texts)).any():
        other.append(f"another text as sample {int(np.flatnonzero(found_texts != np.asarray(texts))[0])}")
    if other:
        raise ScoresError(f"{path} is another run's: it has {'; '.join(other)}. Delete it or choose another name")
    return checksums


def load_scores(path: str | os.PathLike) -> Tensor:
    """Scores [samples, layers, out] float32 from a finished file, ours or HDF5 in the published layout.

    Raises:
        ScoresError: the file is damaged, of another kind, or unfinished.
    """
    path = Path(path)
    if not path.exists():
        raise ScoresError(f"{path} does not exist")
    if path.suffix in HDF5_SUFFIXES:
        return read_hdf5(path)[0]
    _, checksums, _, scores = _read(path)
    missing = int((checksums == MISSING).sum())
    if missing:
        raise ScoresError(
            f"{path} is unfinished: {missing} of {len(checksums)} samples are missing; run attribute again"
        )
    return scores


def h5py_module() -> ModuleType:
    """The package h5py, which HDF5 files need; ScoresError where it is missing."""
    try:
        import h5py
    except ImportError as error:
        raise ScoresError("HDF5 files need the package h5py: pip install 'gci_kernels[loki]'") from error
    return h5py


def write_hdf5(path: Path, source: Path) -> None:
    """Write a finished file in our layout as HDF5: the published `dataset`, in float32, its settings as attributes.

    Raises:
        ScoresError: `source` is unfinished or damaged, or there is no h5py.
    """
    h5py = h5py_module()
    scores, (settings, _, texts, _) = load_scores(source), _read(source)
    scratch = path.with_name(path.name + ".tmp")
    with h5py.File(scratch, "w") as file:
        chunks = (1, *scores.shape[1:])
        table = file.create_dataset("dataset", data=scores.numpy(), maxshape=(None, *chunks[1:]), chunks=chunks,
                                    compression="gzip")  # fmt: skip
        table.attrs.update({f"metadata_{name}": value for name, value in settings.items()})
        file.create_dataset("texts", data=texts)
    scratch.replace(path)


def read_hdf5(path: Path) -> tuple[Tensor, dict[str, str], np.ndarray | None]:
    """Scores [samples, layers, out] float32, settings and digests of an HDF5 file, published (no digests) or ours.

    Raises:
        ScoresError: the file is damaged or of another layout, or there is no h5py.
    """
    h5py = h5py_module()
    try:
        with h5py.File(path, "r") as file:
            if "dataset" not in file or file["dataset"].ndim != 3:
                raise ScoresError(f"{path} has no dataset [samples, layers, out]")
            table = file["dataset"]
            settings = {name.removeprefix("metadata_"): value for name, value in table.attrs.items()}
            return torch.from_numpy(table[:].astype("f4")), settings, file["texts"][:] if "texts" in file else None
    except OSError as error:
        raise ScoresError(f"{path} is damaged, or no HDF5 file ({error})") from error


def is_finished_hdf5(path: Path, texts: Sequence[int], settings: dict[str, str]) -> bool:
    """Whether `path` already holds the scores of this run.

    Raises:
        ScoresError: it is there and is another run's.
    """
    if not path.exists():
        return False
    _, found, found_texts = read_hdf5(path)
    same = found_texts is not None and found_texts.tolist() == list(texts)
    if not same or any(found.get(name) != value for name, value in settings.items()):
        raise ScoresError(f"{path} is another run's (text, model or settings): delete it or choose another name")
    return True
