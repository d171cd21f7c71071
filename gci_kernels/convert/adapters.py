"""Adapters in folders: adapter_config.json, and tensors by module and part."""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftConfig

from gci_kernels.convert import files
from gci_kernels.convert.files import ConvertError, Plan
from gci_kernels.progress import bar

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # of every key in an adapter's file

Config = TypeVar("Config", bound=PeftConfig)
#: Of each module the keys of its tensors, by part.
Parts = dict[str, dict[str, str]]


def read_fields(path: Path, config_cls: type[PeftConfig], required: Iterable[str] = ()) -> dict[str, Any]:
    """The fields in a config file of ours.

    Raises:
        ConvertError: the file cannot be read, has a field that `config_cls` has not, or lacks a required one.
    """
    found = files.read_json(path)
    unknown = sorted(found.keys() - {field.name for field in dataclasses.fields(config_cls)})
    if unknown:
        raise ConvertError(f"{path} has {', '.join(unknown)}, which this version's {config_cls.__name__} does not know")
    missing = [field for field in required if field not in found]
    if missing:
        raise ConvertError(f"{path} lacks {missing[0]}")
    return found


def make_config(config_cls: type[Config], path: Path, **fields: Any) -> Config:
    """A config from the fields in the file `path`; ConvertError names the file where one is not allowed."""
    try:
        return config_cls(**fields)
    except (ValueError, TypeError) as error:
        raise ConvertError(f"{path}: {error}") from error


def group_by_module(
    keys: Iterable[str],
    pattern: re.Pattern[str],
    path: Path,
    method: str,
    *,
    modules: Collection[str] | None = None,
    is_saved_whole: Callable[[str], bool] = lambda name: False,
) -> tuple[Parts, dict[str, str]]:
    """An adapter's keys by module and part, and the keys of modules that are saved whole by their names in the model.

    Args:
        keys: all keys in the file, each of which must begin with PREFIX.
        pattern: what follows, with groups "module" and "part".
        path: the file, for messages.
        method: the method's name, for messages.
        modules: the modules that may have parts; None: any.
        is_saved_whole: whether a name belongs to one of modules_to_save.

    Raises:
        ConvertError: a key is neither.
    """
    parts: Parts = {}
    others: dict[str, str] = {}
    for key in keys:
        name = key.removeprefix(PREFIX)
        match = pattern.fullmatch(name)
        if key != name and match and (modules is None or match["module"] in modules):
            parts.setdefault(match["module"], {})[match["part"]] = key
        elif key != name and not match and is_saved_whole(name):
            others[name] = key
        else:
            raise ConvertError(f"{path} holds {key}, which is no part of this {method} adapter")
    return parts, others


def check_parts(
    found: Mapping[str, tuple[int, ...]],
    allowed: Mapping[str, tuple[int, ...]],
    path: Path,
    name: Callable[[str], str],
    source: str,
) -> None:
    """That a module has exactly the parts `allowed`, of these shapes.

    Args:
        found: the shapes of its parts.
        allowed: what they must be.
        path: the file, for messages.
        name: from a part to its name in messages.
        source: what determines `allowed`, for messages.

    Raises:
        ConvertError: a part is missing, unknown or of another shape.
    """
    for part in (*allowed, *sorted(found.keys() - allowed.keys())):
        if part not in found:
            raise ConvertError(f"{path} lacks {name(part)}: it does not fit {source}")
        if part not in allowed:
            raise ConvertError(f"{path} holds {name(part)}: it does not fit {source}")
        if tuple(found[part]) != allowed[part]:
            shapes = f"{list(found[part])}, it must be {list(allowed[part])}"
            raise ConvertError(f"{path}: {name(part)} has shape {shapes} to fit {source}")


def write_adapter(source: Path, out: Path, config: PeftConfig, plan: Plan, text: str, progress: bool) -> None:
    """Makes the folder `out` with an adapter of ours, and copies the tokenizer and the like from `source`.

    `text` names the work beside the progress bar.
    """
    with files.new_folder(out) as scratch:
        config.save_pretrained(str(scratch))
        files.copy_companions(source, scratch)
        total = sum(tensor.nbytes for tensor in plan.values())
        with bar(text, total, in_bytes=True, shown=progress) as shown:
            files.write_safetensors(scratch / ADAPTER, plan, shown.advance)
