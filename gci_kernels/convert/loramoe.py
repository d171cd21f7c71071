"""LoRAMoE adapters of the published repository (Ablustrund/LoRAMoE, arXiv 2312.09979), to and from GCI_LORAMOE.

A published adapter is adapter_model.bin and adapter_config.json of a PEFT fork, whose LoRA config has more fields. A
module has a linear layer for each expert's A [r, in] and B [out, r], and one, lora_route [N, in], for the gates. Ours
stacks the experts: A [N*r, in], B [out, N*r], router [N, in].
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gci_kernels.convert import adapters, files
from gci_kernels.convert.adapters import ADAPTER, ADAPTER_CONFIG, PREFIX
from gci_kernels.convert.files import Checkpoint, ConvertError, LazyTensor
from gci_kernels.convert.formats import Conversion, Converted, Format, adapter_format
from gci_kernels.progress import bar
from gci_kernels.tuners import LoRAMoEConfig, LoRAMoELinear
from gci_kernels.tuners.adapter_file import is_settings, rename

WEIGHTS = "adapter_model.bin"

_PUBLISHED_PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>route|[AB](?:0|[1-9]\d*))\.weight")
_OUR_PART = re.compile(r"(?P<module>.+)\.loramoe_(?P<part>A|lora_B|router)")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
# The fields of a published config. Those with a value here must have it: ours has no counterpart for another.
_FIXED: dict[str, Any] = {"bias": "none", "enable_lora": None, "fan_in_fan_out": False, "merge_weights": False}
_NUMBERS = ("r", "lora_alpha", "lora_nums", "lora_dropout", "blc_alpha", "blc_weight")
_OTHERS = (
    "base_model_name_or_path", "inference_mode", "modules_to_save", "peft_type", "target_modules", "task_type",
)  # fmt: skip

# Of each module, its tensors by part.
Tensors = dict[str, dict[str, Tensor]]


def loramoe_from_published(
    folder: str | os.PathLike, out: str | os.PathLike, *, progress: bool = True
) -> Converted:  # fmt: skip
    """A published LoRAMoE adapter as an adapter for PeftModel.from_pretrained; its values and dtypes stay.

    Args:
        folder: holds adapter_model.bin, which is read without running any code in it, and adapter_config.json.
        out: the new folder; it must not exist, or be empty.
        progress: show a progress bar on stderr.

    Raises:
        ConvertError: a file is missing or damaged, weights are missing, unknown or of a shape that does not fit r and
            lora_nums, a field of the config is missing, unknown, or has no counterpart. Nothing is left in `out`.
    """
    folder, out = Path(folder), Path(out)
    files.check_target(out)
    published, path = _published_config(folder / ADAPTER_CONFIG), folder / WEIGHTS
    parts, saved = _sort(files.read_pickle(path), _PUBLISHED_PART, published["modules_to_save"], path)
    config = _our_config(published, parts, folder / ADAPTER_CONFIG, path)
    plan = {PREFIX + name: LazyTensor.of(tensor) for name, tensor in saved.items()}
    source = f"r={config.r} and lora_nums={config.num_experts}"
    for module, found in parts.items():
        inner, outer = _sizes(found.get("A0"), found.get("B0"))
        allowed: dict[str, tuple[int, int]] = {}
        for i in range(config.num_experts):
            allowed |= {f"A{i}": (config.r, inner), f"B{i}": (outer, config.r)}
        allowed["route"] = (config.num_experts, inner)
        _check_tensors(found, allowed, path, f"{module}.lora_{{}}.weight", source)
        plan |= _stacked(PREFIX + module, found, config.num_experts)
    adapters.write_adapter(folder, out, config, plan, "stacking experts", progress)
    return Converted(len(parts))


def loramoe_to_published(folder: str | os.PathLike, out: str | os.PathLike, *, progress: bool = True) -> Converted:
    """A LoRAMoE adapter of ours in the published format; values and dtypes stay.

    Args:
        folder: holds adapter_model.safetensors and adapter_config.json.
        out, progress: as in :func:`loramoe_from_published`.

    Raises:
        ConvertError: as :func:`loramoe_from_published`; and for top_k, which the published layer does not know.
    """
    folder, out = Path(folder), Path(out)
    files.check_target(out)
    config, path = _read_our_config(folder / ADAPTER_CONFIG), folder / ADAPTER
    checkpoint = Checkpoint(folder, ADAPTER)
    weights = rename({name: checkpoint[name] for name in checkpoint}, LoRAMoELinear.former_names)
    weights = {name: tensor for name, tensor in weights.items() if not is_settings(name)}
    parts, saved = _sort(weights, _OUR_PART, config.modules_to_save, path)
    width, source = config.num_experts * config.r, f"r={config.r} and num_experts={config.num_experts}"
    weights = {PREFIX + name: tensor.clone() for name, tensor in saved.items()}
    total = sum(_nbytes(found) for found in parts.values())
    with bar("splitting experts", total, in_bytes=True, shown=progress) as shown:
        for module, found in parts.items():
            inner, outer = _sizes(found.get("A"), found.get("lora_B"))
            allowed = {"A": (width, inner), "lora_B": (outer, width), "router": (config.num_experts, inner)}
            _check_tensors(found, allowed, path, f"{module}.loramoe_{{}}", source)
            weights |= _experts(PREFIX + module, found, config.r)
            shown.advance(_nbytes(found))
    with files.new_folder(out) as scratch:
        files.write_json(scratch / ADAPTER_CONFIG, _their_config(config, set(parts)))
        files.copy_companions(folder, scratch)
        torch.save(weights, scratch / WEIGHTS)
    counted = config.balance_weight and not config.balance_include_padding
    note = "its balance constraint left padding out; in the published training padding counts"
    return Converted(len(parts), (note,) if counted else ())


OURS = adapter_format(LoRAMoEConfig)
PUBLISHED = Format(
    "an adapter of the published LoRAMoE",
    is_adapter=lambda config: config.get("peft_type") == "LORA" and "lora_nums" in config,
)
CONVERSIONS = (
    Conversion(PUBLISHED, "ours", OURS, loramoe_from_published),
    Conversion(OURS, "published", PUBLISHED, loramoe_to_published),
)


def _nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _stacked(name: str, found: dict[str, Tensor], experts: int) -> dict[str, LazyTensor]:
    """A module's tensors in our format, from those of its experts."""
    A, B = ([found[f"{letter}{i}"] for i in range(experts)] for letter in "AB")
    (r, width), height = A[0].shape, B[0].shape[0]
    return {
        f"{name}.loramoe_A": LazyTensor(A[0].dtype, (experts * r, width), lambda: torch.cat(A)),
        f"{name}.loramoe_lora_B": LazyTensor(A[0].dtype, (height, experts * r), lambda: torch.cat(B, dim=1)),
        f"{name}.loramoe_router": LazyTensor.of(found["route"]),
    }


def _experts(name: str, found: dict[str, Tensor], r: int) -> dict[str, Tensor]:
    """A module's tensors in the published format. Copies, as torch.save would write the whole storage of a view."""
    weights = {f"{name}.lora_route.weight": found["router"].clone()}
    for i, (A, B) in enumerate(zip(found["A"].split(r), found["lora_B"].split(r, dim=1), strict=True)):
        weights[f"{name}.lora_A{i}.weight"] = A.clone()
        weights[f"{name}.lora_B{i}.weight"] = B.clone(memory_format=torch.contiguous_format)
    return weights


def _sort(
    weights: dict[str, Tensor], pattern: re.Pattern[str], modules_to_save: list[str] | None, path: Path
) -> tuple[Tensors, dict[str, Tensor]]:
    """The weights by module and part, and those of modules_to_save by name."""
    keys, others = adapters.group_by_module(
        weights, pattern, path, "LoRAMoE", is_saved_whole=lambda name: _is_saved(name, modules_to_save)
    )
    if not keys:
        raise ConvertError(f"{path} holds no experts")
    inside = next((name for name in others if name.rpartition(".")[0] in keys), None)
    if inside is not None:
        raise ConvertError(f"{path} holds {PREFIX}{inside}, an adapted layer's own weight")
    missing = [module for module in modules_to_save or () if not any(_is_saved(name, [module]) for name in others)]
    if missing:
        raise ConvertError(f"{path} lacks the weights of {missing[0]}, one of modules_to_save")
    parts = {module: {part: weights[key] for part, key in found.items()} for module, found in keys.items()}
    return parts, {name: weights[key] for name, key in others.items()}


def _is_saved(name: str, modules_to_save: list[str] | None) -> bool:
    return any(f".{module}." in f".{name}" for module in modules_to_save or ())


def _sizes(A: Tensor | None, B: Tensor | None) -> tuple[int, int]:
    """The sizes "in" and "out" of a layer, 0 where the tensor that has it is missing or of another shape."""
    return (A.shape[-1] if A is not None and A.dim() else 0), (B.shape[0] if B is not None and B.dim() else 0)


def _check_tensors(
    found: dict[str, Tensor], allowed: dict[str, tuple[int, int]], path: Path, key: str, source: str
) -> None:
    """That a module has exactly the parts `allowed`, of these shapes and of one floating-point dtype."""
    adapters.check_parts(
        {part: tuple(tensor.shape) for part, tensor in found.items()}, allowed, path, key.format, source
    )
    dtype = found[next(iter(allowed))].dtype
    for part, tensor in found.items():
        if tensor.dtype != dtype or not dtype.is_floating_point:
            raise ConvertError(f"{path}: {key.format(part)} is {tensor.dtype}, another part of its module {dtype}")


def _published_config(path: Path) -> dict[str, Any]:
    """The published config's fields, all present and of their types; balance settings that are null become 0."""
    config = files.read_json(path)
    for field in (*_NUMBERS, "target_modules"):
        if field not in config:
            raise ConvertError(f"{path} lacks {field}")
    # Another field of a fork could mean another computation.
    unknown = sorted(config.keys() - {*_NUMBERS, *_OTHERS, *_FIXED})
    if unknown:
        raise ConvertError(f"{path} has {', '.join(unknown)}, which the published LoRAMoE does not know")
    for field, allowed in _FIXED.items():
        if field != "merge_weights" and config.get(field, allowed) != allowed:
            raise ConvertError(f"{path}: {field} must be {allowed!r}, got {config[field]!r}, which has no counterpart")
    config = {"modules_to_save": None, "task_type": None, "base_model_name_or_path": None} | config
    config |= {field: config[field] or 0.0 for field in ("blc_alpha", "blc_weight")}
    for field in _NUMBERS:
        if type(config[field]) not in (int, float):
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


def _our_config(published: dict[str, Any], parts: Tensors, path: Path, where: Path) -> LoRAMoEConfig:
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
    return adapters.make_config(
        LoRAMoEConfig, path, r=published["r"], num_experts=published["lora_nums"],
        lora_alpha=published["lora_alpha"], lora_dropout=published["lora_dropout"],
        balance_weight=published["blc_weight"], balance_delta=published["blc_alpha"], balance_include_padding=True,
        target_modules=targets, modules_to_save=published["modules_to_save"], task_type=published["task_type"],
        base_model_name_or_path=published["base_model_name_or_path"], inference_mode=True,
    )  # fmt: skip


def _gap(targets: Iterable[str], modules: Iterable[str]) -> str | None:
    """What is missing so that every target is adapted in every layer, as in the published code; None: nothing."""
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
    found = adapters.read_fields(path, LoRAMoEConfig, required=("r", "num_experts", "lora_alpha"))
    _check_modules(path, "modules_to_save", found.get("modules_to_save"))
    if found.get("target_modules") is not None:
        _check_modules(path, "target_modules", found["target_modules"])
    config = adapters.make_config(LoRAMoEConfig, path, **found)
    if config.top_k not in (None, config.num_experts):
        raise ConvertError(f"{path}: top_k={config.top_k}: the published LoRAMoE uses every expert for every token")
    if config.rank_pattern or config.alpha_pattern:
        raise ConvertError(f"{path}: rank_pattern, alpha_pattern: the published LoRAMoE has one r and lora_alpha")
    return config


def _their_config(config: LoRAMoEConfig, modules: set[str]) -> dict[str, Any]:
    """The published config. Targets stay as they are where they mean the same there, else become full names."""
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
