"""Experts of a mixture that are not layers but slices of one parameter, so that adapters of linear layers miss them."""

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from gci_kernels.models.targets import is_all_linear

_FLAT = {"w1", "v1", "w2"}  # DBRX's, which stack the experts along the first of two dimensions
# In a config's target_modules: names of (parts of) an MLP.
_MLP = re.compile(r"mlp|ffn|feed_forward|moe|expert|gate|up_proj|down_proj|fc_?\d|fc_|^w\d|dense_h|c_fc|_to_h|_linear")


@dataclass(frozen=True)
class Stacks:
    """The stacks of experts in one module of a model.

    Attributes:
        name: of the module.
        parameters: the stacks, by their names in the module.
    """

    name: str
    parameters: dict[str, nn.Parameter]


def find(model: nn.Module) -> list[Stacks]:
    """Parameters of three dimensions (DBRX's: of two) in modules whose name or class is called expert."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) or type(module).__module__.startswith("torch.nn"):
            continue
        if "expert" not in name.lower() and "expert" not in type(module).__name__.lower():
            continue
        stacks = {key: p for key, p in module._parameters.items() if p is not None and (p.dim() == 3 or key in _FLAT)}
        if stacks:
            found.append(Stacks(re.sub(r"(^|\.)base_layer(?=\.|$)", "", name), stacks))
    return found


def left_out(model: nn.Module, config: Any) -> list[Stacks]:
    """The stacks that an adapter leaves frozen although its config targets the MLPs.

    Args:
        model: with the adapter.
        config: the adapter's.
    """
    if not _is_for_mlps(config):
        return []
    reached = {id(module.get_param()) for module in model.modules() if isinstance(module, ParamWrapper)}
    saved = set(getattr(config, "modules_to_save", None) or ())  # trained as a whole
    return [
        Stacks(stacks.name, rest)
        for stacks in find(model)
        if not saved & set(stacks.name.split("."))
        and (rest := {key: p for key, p in stacks.parameters.items() if id(p) not in reached})
    ]


def _is_for_mlps(config: Any) -> bool:
    if getattr(config, "for_mlps", False):
        return True
    targets = getattr(config, "target_modules", None)
    if targets is None:
        return False
    names = [targets] if isinstance(targets, str) else targets
    return is_all_linear(targets) or any(_MLP.search(name.rpartition(".")[2] or name) for name in names)


def describe(stacks: list[Stacks]) -> str:
    """Their names; those that differ in a layer's number alone are written once, with an asterisk for the number."""
    groups: dict[str, None] = {}
    for each in stacks:
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", each.name)
        groups[f"{name}.{{{', '.join(each.parameters)}}}"] = None
    return "; ".join(groups)


def warn(model: nn.Module, config: Any, method: str) -> None:
    """Warns once, with the names of the stacks that stay frozen, if :func:`left_out` finds any.

    Args:
        model, config: as there.
        method: the adapter's, for the message.
    """
    if stacks := left_out(model, config):
        count = sum(p.numel() for each in stacks for p in each.parameters.values())
        adapters = tuple(PEFT_TYPE_TO_PREFIX_MAPPING.values())  # what names of adapters' parameters begin with
        base = (p for n, p in model.named_parameters() if not any(part.startswith(adapters) for part in n.split(".")))
        total = sum(p.numel() for p in base)
        warnings.warn(
            f"{method} leaves this mixture's experts frozen: they are stacks, parameters of three dimensions that "
            f"no layer holds, {describe(stacks)}, {count:,} of the model's {total:,} weights. "
            "peft.LoraConfig(target_parameters=...) adapts them",
            stacklevel=2,
        )


def hint(model: nn.Module) -> str:
    """The end of an error message that says that no layer matches; empty for models without stacks."""
    stacks = find(model)
    if not stacks:
        return ""
    return (
        "; this mixture's experts are stacks, parameters of three dimensions that no layer holds "
        f"({describe(stacks)}): name other target_modules, or adapt the experts with "
        "peft.LoraConfig(target_parameters=...)"
    )


def refuse_part(model: nn.Module, names: Iterable[str]) -> None:
    """Refuses positions by decoder layer, which mean a layer's whole MLP, where the MLP contains stacks.

    Args:
        model: without the adapter.
        names: of the layers to be adapted.

    Raises:
        ValueError: one of them lies in a decoder layer that has stacks.
    """
    layers = {match[0]: stacks for stacks in find(model) if (match := re.match(r".*?\.\d+\.", stacks.name))}
    for name in names:
        match = re.match(r".*?\.\d+\.", name)
        if match and (stacks := layers.get(match[0])) is not None:
            raise ValueError(
                f"positions by decoder layer mean the layer's MLP, but {name} is only a part of that: the experts of "
                f"{stacks.name} are stacks, parameters of three dimensions that no layer holds; name the modules to "
                f"train in positions, such as {name!r}, to leave the experts frozen"
            )
