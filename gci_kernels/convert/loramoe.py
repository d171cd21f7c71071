"""LoRAMoE adapters of the published repository (Ablustrund/LoRAMoE, arXiv 2312.09979), to and from GCI_LORAMOE.

There an adapter is adapter_model.bin and adapter_config.json of a PEFT fork, whose LoRA config has more fields. A
module has a linear layer for each expert's A [r, in] and B [out, r], and one, lora_route [N, in], for the gates. Ours
stacks the experts: A [N*r, in], B [out, N*r], router [N, in].
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gci_kernels.convert.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    Checkpoint,
    Converted,
    ConvertError,
    Planned,
    check_target,
    copy_companions,
    new_folder,
    progress_bar,
    read_json,
    read_pickle,
    write_json,
    write_safetensors,
)
from gci_kernels.tuners import LoRAMoEConfig, LoRAMoELinear
from gci_kernels.tuners.adapter_file import is_settings, rename

WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."

_PUBLISHED_PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>route|[AB](?:0|[1-9]\d*))\.weight")
_OUR_PART = re.compile(r"(?P<module>.+)\.loramoe_(?P<part>A|lora_B|router)")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
# The published config's fields, and what they are in an adapter that ours can be.
_FIXED: dict[str, Any] = {"bias": "none", "enable_lora": None, "fan_in_fan_out": False, "merge_weights": False}
_NUMBERS = ("r", "lora_alpha", "lora_nums", "lora_dropout", "blc_alpha", "blc_weight")
_OTHERS = (
    "base_model_name_or_path", "inference_mode", "modules_to_save", "peft_type", "target_modules", "task_type",
)  # fmt: skip

# Of each module, its parts' names -> tensors or shapes.
Parts = dict[str, dict[str, Tensor]]


def loramoe_from_published(
    folder: str | os.PathLike, out: str | os.PathLike, *, progress: bool = True
) -> Converted:  # fmt: skip
    """A published LoRAMoE adapter as an adapter for PeftModel.from_pretrained; its values and dtypes stay.

    Args:
        folder: holds adapter_model.bin, which is read without running anything in it, and adapter_config.json.
        out: the new folder; it must not be there, or be empty.
        progress: show a bar on stderr.

    Raises:
        ConvertError: a file is missing or damaged, weights are missing, unknown or of a shape that r and lora_nums
            don't give, a field of the config is missing, unknown, or has no counterpart. Nothing is left in `out`.
    """
    folder, out = Path(folder), Path(out)
    check_target(out)
    published = _published_config(folder / ADAPTER_CONFIG)
    weights = read_pickle(folder / WEIGHTS)
    where = folder / WEIGHTS
    parts, saved = _sort(weights, _PUBLISHED_PART, published["modules_to_save"], where)
    config = _our_config(published, parts, folder / ADAPTER_CONFIG, where)
    plan = {PREFIX + name: _planned(tensor) for name, tensor in saved.items()}
    reason = f"r={config.r} and lora_nums={config.num_experts}"
    for module, found in parts.items():
        inner, outer = _sizes(found.get("A0"), found.get("B0"))
        allowed: dict[str, tuple[int, int]] = {}
        for i in range(config.num_experts):
            allowed |= {f"A{i}": (config.r, inner), f"B{i}": (outer, config.r)}
        allowed["route"] = (config.num_experts, inner)
        _check(found, allowed, f"{module}.lora_{{}}.weight", where, reason)
        plan |= _stacked(PREFIX + module, found, config.num_experts)
    with new_folder(out) as scratch:
        config.save_pretrained(str(scratch))
        copy_companions(folder, scratch)
        with progress_bar("stacking experts", sum(p.nbytes for p in plan.values()), progress) as advance:
            write_safetensors(scratch / ADAPTER, plan, advance)
    return Converted(len(parts))


def loramoe_to_published(folder: str | os.PathLike, out: str | os.PathLike, *, progress: bool = True) -> Converted:
    """A LoRAMoE adapter of ours as the published repository saves its own; values and dtypes stay.

    Args:
        folder: holds adapter_model.safetensors and adapter_config.json.
        out, progress: as in :func:`loramoe_from_published`.

    Raises:
        ConvertError: as :func:`loramoe_from_published`; and for top_k, which the published layer does not know.
    """
    folder, out = Path(folder), Path(out)
    check_target(out)
    config, where = _read_our_config(folder / ADAPTER_CONFIG), folder / ADAPTER
    checkpoint = Checkpoint(folder, ADAPTER)
    weights = rename({name: checkpoint[name] for name in checkpoint}, LoRAMoELinear.former_names)
    weights = {name: tensor for name, tensor in weights.items() if not is_settings(name)}
    parts, saved = _sort(weights, _OUR_PART, config.modules_to_save, where)
    width, reason = config.num_experts * config.r, f"r={config.r} and num_experts={config.num_experts}"
    weights = {PREFIX + name: tensor.clone() for name, tensor in saved.items()}
    with progress_bar("splitting experts", sum(_nbytes(found) for found in parts.values()), progress) as advance:
        for module, found in parts.items():
            inner, outer = _sizes(found.get("A"), found.get("lora_B"))
            allowed = {"A": (width, inner), "lora_B": (outer, width), "router": (config.num_experts, inner)}
            _check(found, allowed, f"{module}.loramoe_{{}}", where, reason)
            weights |= _experts(PREFIX + module, found, config.r)
            advance(_nbytes(found))
    with new_folder(out) as scratch:
        write_json(scratch / ADAPTER_CONFIG, _their_config(config, set(parts)))
        copy_companions(folder, scratch)
        torch.save(weights, scratch / WEIGHTS)
    counted = config.balance_weight and not config.balance_include_padding
    note = "its balance constraint left padding out; in the published training padding counts"
    return Converted(len(parts), (note,) if counted else ())


def _planned(tensor: Tensor) -> Planned:
    return Planned(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _stacked(name: str, found: dict[str, Tensor], experts: int) -> dict[str, Planned]:
    """A module's experts side by side."""
    A, B = ([found[f"{letter}{i}"] for i in range(experts)] for letter in "AB")
    (r, width), height = A[0].shape, B[0].shape[0]
    return {
        f"{name}.loramoe_A": Planned(A[0].dtype, (experts * r, width), lambda: torch.cat(A)),
        f"{name}.loramoe_lora_B": Planned(A[0].dtype, (height, experts * r), lambda: torch.cat(B, dim=1)),
        f"{name}.loramoe_router": _planned(found["route"]),
    }


def _experts(name: str, found: dict[str, Tensor], r: int) -> dict[str, Tensor]:
    """A module's experts one by one. Copies: torch.save would write the whole of what a view is a part of."""
    weights = {f"{name}.lora_route.weight": found["router"].clone()}
    for i, (A, B) in enumerate(zip(found["A"].split(r), found["lora_B"].split(r, dim=1), strict=True)):
        weights[f"{name}.lora_A{i}.weight"] = A.clone()
        weights[f"{name}.lora_B{i}.weight"] = B.clone(memory_format=torch.contiguous_format)
    return weights


def _sort(
    weights: dict[str, Tensor], pattern: re.Pattern[str], modules_to_save: list[str] | None, where: Path
) -> tuple[Parts, dict[str, Tensor]]:
    """The weights by module and part, and those of the modules that were trained whole."""
    parts: Parts = {}
    others: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        name = key.removeprefix(PREFIX)
        match = pattern.fullmatch(name)
        if key == name or (match is None and not _is_saved(name, modules_to_save)):
            raise ConvertError(f"{where} holds {key}, which is no part of a LoRAMoE adapter")
        if match is None:
            others[name] = tensor
        else:
            parts.setdefault(match["module"], {})[match["part"]] = tensor
    if not parts:
        raise ConvertError(f"{where} holds no experts")
    inside = next((name for name in others if name.rpartition(".")[0] in parts), None)
    if inside is not None:
        raise ConvertError(f"{where} holds {PREFIX}{inside}, an adapted layer's own weight")
    missing = [module for module in modules_to_save or () if not any(_is_saved(name, [module]) for name in others)]
    if missing:
        raise ConvertError(f"{where} lacks the weights of {missing[0]}, one of modules_to_save")
    return parts, others


def _is_saved(name: str, modules_to_save: list[str] | None) -> bool:
    return any(f".{module}." in f".{name}" for module in modules_to_save or ())


def _sizes(A: Tensor | None, B: Tensor | None) -> tuple[int, int]:
    """in and out, as far as there are tensors that have them."""
    return (A.shape[-1] if A is not None and A.dim() else 0), (B.shape[0] if B is not None and B.dim() else 0)


def _check(
    found: dict[str, Tensor], allowed: Mapping[str, tuple[int, ...]], key: str, where: Path, reason: str
) -> None:  # fmt: skip
    """A module's parts: all of them, no other, of these shapes and one dtype."""
    missing = [part for part in allowed if part not in found]
    if missing:
        raise ConvertError(f"{where} lacks {key.format(missing[0])}")
    extra = sorted(found.keys() - allowed.keys())
    if extra:
        raise ConvertError(f"{where} holds {key.format(extra[0])}: an expert more than {reason} allow")
    dtype = found[next(iter(allowed))].dtype
    for part in allowed:
        tensor = found[part]
        if tuple(tensor.shape) != allowed[part]:
            shapes = f"{list(tensor.shape)}, and {reason} make it {list(allowed[part])}"
            raise ConvertError(f"{where}: {key.format(part)} has shape {shapes}")
        if tensor.dtype != dtype or not dtype.is_floating_point:
            raise ConvertError(f"{where}: {key.format(part)} is {tensor.dtype}, another part of its module {dtype}")


def _published_config(path: Path) -> dict[str, Any]:
    """The published config's fields, each there and of its type; null balance settings as 0."""
    config = read_json(path)
    for field in (*_NUMBERS, "target_modules"):
        if field not in config:
            raise ConvertError(f"{path} lacks {field}")
    # A fork's further field could mean another computation.
    unknown = sorted(config.keys() - {*_NUMBERS, *_OTHERS, *_FIXED})
    if unknown:
        raise ConvertError(f"{path} has {', '.join(unknown)}, which the published LoRAMoE does not know")
    for field, allowed in _FIXED.items():
        if field != "merge_weights" and config.get(field, allowed) != allowed:
            raise ConvertError(f"{path}: {field} must be {allowed!r}, got {config[field]!r}, which has no counterpart")
    config = {"modules_to_save": None, "task_type": None, "base_model_name_or_path": None} | config
    config |= {field: config[field] or 0.0 for field in ("blc_alpha", "blc_weight")}
    for field in _NUMBERS:
        if not isinstance(config[field], (int, float)) or isinstance(config[field], bool):
            raise ConvertError(f"{path}: {field} must be a number, got {config[field]!r}")
    for field in ("target_modules", "modules_to_save"):
        _check_modules(path, field, config[field])
    return config


def _check_modules(path: Path, field: str, value: object) -> None:
    names = isinstance(value, list) and value and all(isinstance(name, str) and name for name in value)
    allowed = isinstance(value, str) if field == "target_modules" else value in (None, [])
    if not names and not allowed:
        raise ConvertError(f"{path}: {field} must be a list of module names, got {value!r}")
    try:
        re.compile(value if isinstance(value, str) else "")
    except re.error as error:
        raise ConvertError(f"{path}: {field} is no regular expression: {error}") from error


def _our_config(published: dict[str, Any], parts: Parts, path: Path, where: Path) -> LoRAMoEConfig:
    targets = published["target_modules"]
    if isinstance(targets, str):
        strange = [module for module in parts if not re.fullmatch(targets, module)]
    else:
        strange = [module for module in parts if not module.endswith(tuple(targets))]
        gap = _gap(targets, parts)
        if gap is not None:
            raise ConvertError(f"{where} lacks {gap}, which {path.name} names as a target")
        # The published code compares ends of names, wherever in a word they begin; PEFT compares whole words.
        whole = tuple(f".{target}" for target in targets)
        targets = targets if all(f".{module}".endswith(whole) for module in parts) else sorted(parts)
    if strange:
        raise ConvertError(f"{where} holds experts of {strange[0]}, which {path.name} does not name as a target")
    try:
        return LoRAMoEConfig(
            r=published["r"], num_experts=published["lora_nums"], lora_alpha=published["lora_alpha"],
            lora_dropout=published["lora_dropout"], balance_weight=published["blc_weight"],
            balance_delta=published["blc_alpha"], balance_include_padding=True, target_modules=targets,
            modules_to_save=published["modules_to_save"], task_type=published["task_type"],
            base_model_name_or_path=published["base_model_name_or_path"], inference_mode=True,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise ConvertError(f"{path}: {error}") from error


def _gap(targets: Iterable[str], modules: Iterable[str]) -> str | None:
    """What is missing for every target to be adapted in every layer, as the published code does it, or None."""
    numbers: dict[str, set[int]] = {}
    for target in targets:
        named = [module for module in modules if module.endswith(target)]
        if not named:
            return f"the experts of {target}"
        if not _LAYER.search(target):  # else it is of one layer
            numbers[target] = {int(match[1]) for module in named if (match := _LAYER.search(module))}
    layers = set(range(1 + max((max(found) for found in numbers.values() if found), default=-1)))
    for target, found in numbers.items():
        missing = sorted(layers - found) if found else []
        if missing:
            return f"the experts of layer {missing[0]}'s {target}"
    return None


def _read_our_config(path: Path) -> LoRAMoEConfig:
    found = read_json(path)
    unknown = sorted(found.keys() - {field.name for field in dataclasses.fields(LoRAMoEConfig)})
    if unknown:
        raise ConvertError(f"{path} has {', '.join(unknown)}, which this version of GCI_LORAMOE does not know")
    missing = [field for field in ("r", "num_experts", "lora_alpha") if field not in found]
    if missing:
        raise ConvertError(f"{path} lacks {missing[0]}")
    _check_modules(path, "modules_to_save", found.get("modules_to_save"))
    if found.get("target_modules") is not None:
        _check_modules(path, "target_modules", found["target_modules"])
    try:
        config = LoRAMoEConfig(**found)
    except (ValueError, TypeError) as error:
        raise ConvertError(f"{path}: {error}") from error
    if config.top_k not in (None, config.num_experts):
        raise ConvertError(f"{path}: top_k={config.top_k}: the published LoRAMoE uses every expert for every token")
    if config.rank_pattern or config.alpha_pattern:
        raise ConvertError(f"{path}: rank_pattern, alpha_pattern: the published LoRAMoE has one r and lora_alpha")
    return config


def _their_config(config: LoRAMoEConfig, modules: set[str]) -> dict[str, Any]:
    """The published config; its targets are names as given where they mean the same there, else whole names."""
    plain = config.layers_to_transform is None and config.layers_pattern is None and config.exclude_modules is None
    targets: list[str] = sorted(config.target_modules) if isinstance(config.target_modules, set) and plain else []
    if not targets or _gap(targets, modules) or not all(module.endswith(tuple(targets)) for module in modules):
        targets = sorted(modules)
    return _FIXED | {
        "base_model_name_or_path": config.base_model_name_or_path, "blc_alpha": config.balance_delta,
        "blc_weight": config.balance_weight, "inference_mode": True, "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout, "lora_nums": config.num_experts, "modules_to_save": config.modules_to_save,
        "peft_type": "LORA", "r": config.r, "target_modules": targets, "task_type": config.task_type,
    }  # fmt: skip
