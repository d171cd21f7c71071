"""Scores of many samples written to a file in batches, so that a killed run resumes."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from gci_kernels.loki.architecture import Architecture
from gci_kernels.loki.attribution import attribute, samples_together
from gci_kernels.loki.scores import HDF5_SUFFIXES, ScoresFile, digest, is_finished_hdf5, write_hdf5
from gci_kernels.models.model_state import fingerprint
from gci_kernels.progress import bar as progress_bar


def attribute_file(
    model: nn.Module,
    samples: Sequence[Sequence[int]],
    out: str | os.PathLike,
    *,
    path: str = "last_position",
    steps: int = 7,
    projection: str | None = None,
    batch: int | None = None,
    after: Callable[[int], None] | None = None,
    progress: bool = True,
) -> None:
    """:func:`attribute` for each of `samples` into the file `out`; samples that it holds already are left out.

    Args:
        model: as for :func:`attribute`.
        samples: token ids, a sequence for each sample.
        out: the file. ".h5" or ".hdf5" gives the published layout (with the package h5py), written at the end from
            a file beside it that ends in ".partial"; every other name gives safetensors (see :mod:`.scores`).
        path, steps, projection: as for :func:`attribute`.
        batch: samples at a time, which is what a killed run repeats at most; default: as many as are scored together.
        after: called after every batch with the number of finished samples.
        progress: show a progress bar on stderr, removed at the end.

    Raises:
        ScoresError: `out` is there and is damaged or another run's (model, samples or settings). It stays as it is.
        ValueError: as :func:`attribute`.
        FloatingPointError: a score that is not finite; what was written before stays.
    """
    out = Path(out)
    if not samples or not all(len(tokens) for tokens in samples):
        raise ValueError("samples must be at least one sequence of token ids, none of them empty")
    arch = Architecture.of(model, projection)
    texts = [digest(tokens) for tokens in samples]
    settings = {"model": fingerprint(model), "path": path, "steps": str(steps)}
    hdf5 = out.suffix in HDF5_SUFFIXES
    if hdf5 and is_finished_hdf5(out, texts, settings):
        return
    growing = out.with_name(out.name + ".partial") if hdf5 else out
    config: Any = model.config
    shape = (len(arch.layers), config.get_text_config().hidden_size)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(ScoresFile(growing, texts, shape, settings))
        missing, size = file.missing, batch or samples_together(arch, path, steps)
        done = len(samples) - len(missing)
        bar = stack.enter_context(progress_bar("attribution", len(samples), completed=done, shown=progress))
        for first in range(0, len(missing), size):
            numbers = missing[first : first + size]
            device: Any = model.device
            rows = [torch.as_tensor(samples[number], dtype=torch.int64, device=device) for number in numbers]
            ids, mask = (pad_sequence(each, batch_first=True) for each in (rows, list(map(torch.ones_like, rows))))
            scores = attribute(model, ids, mask, path=path, steps=steps, projection=projection)
            for number, found in zip(numbers, scores, strict=True):
                file.write(number, found)
            bar.advance(len(numbers))
            if after:
                after(len(samples) - len(file.missing))
    if hdf5:
        write_hdf5(out, growing)
        growing.unlink()
