"""What a folder holds, and the conversion that it asks for."""

import enum
import os
from pathlib import Path

from gci_kernels.convert.files import ADAPTER_CONFIG, INDEX, MODEL, Checkpoint, Converted, ConvertError, read_json
from gci_kernels.convert.loki import loki_from_published, loki_merge_published, loki_to_published
from gci_kernels.convert.loramoe import loramoe_from_published, loramoe_to_published
from gci_kernels.convert.published_layers import is_split
from gci_kernels.tuners import LoKIConfig, LoRAMoEConfig
from gci_kernels.tuners.methods import method_type


class Kind(enum.Enum):
    """What a folder holds; the value says it in words."""

    PUBLISHED_LORAMOE = "an adapter of the published LoRAMoE"
    PUBLISHED_LOKI = "a model of the published LoKI"
    LORAMOE = "a GCI_LORAMOE adapter"
    LOKI = "a GCI_LOKI adapter"
    PLAIN = "a plain model"


# What each can become, the first if nothing is asked for.
_TARGETS = {
    Kind.PUBLISHED_LORAMOE: {"ours": Kind.LORAMOE},
    Kind.PUBLISHED_LOKI: {"ours": Kind.LOKI, "plain": Kind.PLAIN},
    Kind.LORAMOE: {"published": Kind.PUBLISHED_LORAMOE},
    Kind.LOKI: {"published": Kind.PUBLISHED_LOKI},
    Kind.PLAIN: {},
}
TO = ("ours", "published", "plain")


def recognise(folder: str | os.PathLike) -> Kind:
    """What `folder` holds, by its configs and the names of its tensors.

    Raises:
        ConvertError: it is no folder, holds nothing that can be converted, or a file in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConvertError(f"{folder} is no folder" if folder.exists() else f"{folder} does not exist")
    config = folder / ADAPTER_CONFIG
    if config.is_file():
        found = read_json(config)
        method = found.get("peft_type")
        for config_cls, kind in ((LoRAMoEConfig, Kind.LORAMOE), (LoKIConfig, Kind.LOKI)):
            if method in (method_type(config_cls.method).value, method_type(config_cls.method).in_file):
                return kind
        if method == "LORA" and "lora_nums" in found:
            return Kind.PUBLISHED_LORAMOE
        raise ConvertError(f"{config}: an adapter of {method!r} without lora_nums is not one that has two formats")
    if not (folder / MODEL).is_file() and not (folder / INDEX).is_file():
        raise ConvertError(f"{folder} holds none of {ADAPTER_CONFIG}, {MODEL} and {INDEX}")
    return Kind.PUBLISHED_LOKI if is_split(Checkpoint(folder)) else Kind.PLAIN


def convert(
    source: str | os.PathLike, target: str | os.PathLike, *, to: str | None = None,
    base: str | os.PathLike | None = None, positions: str | os.PathLike | None = None, progress: bool = True,
) -> Converted:  # fmt: skip
    """Converts a checkpoint of the published LoRAMoE or LoKI repository to ours, or one of ours to theirs.

    Args:
        source: the folder to read.
        target: the folder to make; it must not be there, or be empty.
        to: "ours", "published", or "plain" (a published LoKI model put together); None: the other format.
        base: the folder of the base model. A LoKI adapter needs it to become a published model; a published LoKI model
            is compared with it.
        positions: a published LoKI model's positions JSON, where its checkpoint does not say them, or to compare.
        progress: show a bar on stderr.

    Raises:
        ConvertError: a file is missing or damaged, or the checkpoint cannot become that. Nothing is left in `target`.
    """
    kind = recognise(source)
    possible = _TARGETS[kind]
    if to not in possible and (to is not None or not possible):
        allowed = " or ".join(possible) or "nothing else"
        raise ConvertError(f"{source} is {kind.value}, which can become {allowed}" + (f", not {to}" if to else ""))
    new = possible[to or next(iter(possible))]
    if base is not None and (kind, new) not in ((Kind.LOKI, Kind.PUBLISHED_LOKI), (Kind.PUBLISHED_LOKI, Kind.LOKI)):
        raise ConvertError(f"base is of no use: {source} is {kind.value} and becomes {new.value} without one")
    if positions is not None and kind != Kind.PUBLISHED_LOKI:
        raise ConvertError(f"positions are of no use: {source} is {kind.value}, which needs none")
    if new == Kind.LORAMOE:
        return loramoe_from_published(source, target, progress=progress)
    if new == Kind.PUBLISHED_LORAMOE:
        return loramoe_to_published(source, target, progress=progress)
    if new == Kind.LOKI:
        return loki_from_published(source, target, base=base, positions=positions, progress=progress)
    if new == Kind.PLAIN:
        return loki_merge_published(source, target, positions=positions, progress=progress)
    if base is None:
        raise ConvertError(f"{source} is {kind.value}: give base, the folder of the model that it adapts")
    return loki_to_published(source, target, base=base, progress=progress)
