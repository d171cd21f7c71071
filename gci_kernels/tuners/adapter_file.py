"""What keeps an adapter's file and the model that it is loaded into together: nothing of either may be left over."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Settings(nn.Module):
    """The numbers that one adapter of one layer computes with and that its tensors' shapes do not show.

    They are saved among the tensors, so that a file and a config that do not belong together are found out. No buffer:
    DDP would send it around, and offloading would move it.
    """

    def __init__(self, where: str, values: Mapping[str, float]) -> None:
        super().__init__()
        self.where, self.values = where, dict(values)

    def get_extra_state(self) -> Tensor:
        """[values] float32 on the CPU."""
        return torch.tensor(list(self.values.values()), dtype=torch.float32)

    def set_extra_state(self, state: Tensor) -> None:
        """Compares; ValueError where a value is another. Nothing is changed."""
        pairs = zip(self.values.items(), state.tolist(), strict=False)
        # Of 16 bits, should someone have cast the file.
        wrong = [(name, was, now) for (name, now), was in pairs if not math.isclose(now, was, rel_tol=4e-3)]
        if wrong:
            was = ", ".join(f"{name}={value:g}" for name, value, _ in wrong)
            now = ", ".join(f"{name}={value:g}" for name, _, value in wrong)
            raise ValueError(
                f"{self.where}: the adapter's weights were saved with {was}, here is {now}; load them into the model "
                "that they were trained in, with the adapter_config.json of their folder"
            )

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, *lists) -> None:
        # Adapters that were saved before there were settings have none to compare.
        super()._load_from_state_dict(state_dict, prefix, metadata, False, *lists)


def is_settings(key: str) -> bool:
    """Whether `key` of a file holds Settings."""
    return key.endswith("_settings._extra_state")


def rename(state_dict: Mapping[str, Any], former: Mapping[str, str]) -> dict[str, Any]:
    """`state_dict` with its parameters' present names in place of `former` ones, which earlier files have."""
    if not former:
        return dict(state_dict)
    pattern = re.compile(rf"(^|\.)({'|'.join(map(re.escape, former))})(?=\.|$)")
    return {pattern.sub(lambda found: found[1] + former[found[2]], key): value for key, value in state_dict.items()}


def check_keys(prefix: str, adapter_name: str, model_keys: Iterable[str], found: Iterable[str]) -> None:
    """That the keys `found` in a file are those of the adapter in the model.

    Args:
        prefix: what the method's parameters begin with.
        model_keys: of the model's state dict.
        found: the file's, with the adapter's name in them as the model has it.

    Raises:
        ValueError: naming what the file lacks, and what it has beside.
    """
    model_keys, found = set(model_keys), set(found)
    parameter = re.compile(rf"(^|\.){re.escape(prefix)}\w+\.{re.escape(adapter_name)}$")
    lacks = {key for key in model_keys if parameter.search(key)} - found
    # With embeddings PEFT saves what modules_to_save holds a second time.
    known = model_keys | {key.replace(f".{adapter_name}.", ".") for key in model_keys & found}
    beside = {key for key in found - known if key.removeprefix("base_model.model.") not in known}
    parts = [(lacks, "lacks"), (beside, "has, for no place in this model,")]
    wrong = "; it ".join(f"{verb} {_listed(keys)}" for keys, verb in parts if keys)
    if wrong:
        raise ValueError(
            f"the file of adapter {adapter_name!r} does not fit: it {wrong}. Is it an adapter of another model, of "
            "other target_modules, or incomplete?"
        )


def _listed(keys: Iterable[str], most: int = 4) -> str:
    names = sorted(keys)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
