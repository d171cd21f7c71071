"""The table of conversions, the format of a folder, and the conversion of one."""

import os
from pathlib import Path

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from gci_kernels.convert import loki, loramoe
from gci_kernels.convert.adapters import ADAPTER_CONFIG
from gci_kernels.convert.files import INDEX, MODEL, Checkpoint, ConvertError, read_json
from gci_kernels.convert.formats import PLAIN, Converted, Format

CONVERSIONS = (*loramoe.CONVERSIONS, *loki.CONVERSIONS)
FORMATS = tuple(dict.fromkeys(side for each in CONVERSIONS for side in (each.source, each.target)))
TO = tuple(dict.fromkeys(each.to for each in CONVERSIONS))


def recognise(folder: str | os.PathLike) -> Format:
    """The format of what `folder` holds, by its configs and the names of its tensors.

    Raises:
        ConvertError: it is no folder, holds nothing that can be converted, or a file in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConvertError(f"{folder} is no folder" if folder.exists() else f"{folder} does not exist")
    if (folder / ADAPTER_CONFIG).is_file():
        return _adapter_format(folder / ADAPTER_CONFIG)
    if not (folder / MODEL).is_file() and not (folder / INDEX).is_file():
        raise ConvertError(f"{folder} holds none of {ADAPTER_CONFIG}, {MODEL} and {INDEX}")
    checkpoint = Checkpoint(folder)
    return next((each for each in FORMATS if each.is_model and each.is_model(checkpoint)), PLAIN)


def _adapter_format(path: Path) -> Format:
    config = read_json(path)
    for each in FORMATS:
        if each.is_adapter and each.is_adapter(config):
            return each
    method = config.get("peft_type")
    known = ", ".join(each.description for each in FORMATS if each.is_adapter)
    if not isinstance(method, str) or method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ConvertError(
            f"{path} says peft_type={method!r}, which no registered method has: import the module that registers it, "
            f"or correct the name; what can be converted is {known}"
        )
    raise ConvertError(f"{path}: an adapter of {method!r} has no published format; what can be converted is {known}")


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    to: str | None = None,
    base: str | os.PathLike | None = None,
    positions: str | os.PathLike | None = None,
    progress: bool = True,
) -> Converted:
    """Converts a checkpoint of the published LoRAMoE or LoKI repository to ours, or one of ours to theirs.

    Args:
        source: the folder to read.
        target: the folder to make; it must not exist, or be empty.
        to: "ours", "published", or "plain" (a published LoKI model with whole layers); None: the other format.
        base: the folder of the base model. A LoKI adapter needs it to become a published model; a published LoKI model
            is compared with it.
        positions: a published LoKI model's positions JSON, where its checkpoint lacks them, or to compare.
        progress: show a progress bar on stderr.

    Raises:
        ConvertError: a file is missing or damaged, or the checkpoint cannot become that. Nothing is left in `target`.
    """
    found = recognise(source)
    possible = {each.to: each for each in CONVERSIONS if each.source is found}
    if to not in possible and (to is not None or not possible):
        allowed = " or ".join(possible) or "nothing else"
        raise ConvertError(
            f"{source} is {found.description}, which can become {allowed}" + (f", not {to}" if to else "")
        )
    conversion = possible[to or next(iter(possible))]
    given = {name: value for name, value in (("base", base), ("positions", positions)) if value is not None}
    for name in given:
        if name not in conversion.options:
            raise ConvertError(
                f"{name} is not used: {source} is {found.description} and becomes {conversion.target.description} "
                "without it"
            )
    for name, needed in conversion.options.items():
        if needed and name not in given:
            raise ConvertError(
                f"{source} is {found.description}: give {name}, to make {conversion.target.description} of it"
            )
    return conversion.run(source, target, **given, progress=progress)
