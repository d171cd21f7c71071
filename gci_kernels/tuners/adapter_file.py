"""Checks that an adapter's file and the model that it is loaded into belong together, key for key."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Settings(nn.Module):
    """The numbers that one adapter of one layer computes with and that its tensors' shapes do not show.

    They are saved among the tensors, so that a file with another adapter's config is refused. They are no buffer: DDP
    would broadcast it, and offloading would move it.
    """

    def __init__(self, where: str, values: Mapping[str, float]) -> None:
        super().__init__()
        self.where, self.values = where, dict(values)

    def get_extra_state(self) -> Tensor:
        """[values] float32 on the CPU."""
        return torch.tensor(list(self.values.values()), dtype=torch.float32)

    def set_extra_state(self, state: Tensor) -> None:
        """ValueError where a value of `state` [values] is another than here. Nothing is changed."""
        pairs = zip(self.values.items(), state.tolist(), strict=False)
        # A tolerance for files that were cast to 16 bits.
        wrong = [(name, saved, here) for (name, here), saved in pairs if not math.isclose(here, saved, rel_tol=4e-3)]
        if wrong:
            saved = ", ".join(f"{name}={value:g}" for name, value, _ in wrong)
            here = ", ".join(f"{name}={value:g}" for name, _, value in wrong)
            raise ValueError(
                f"{self.where}: the adapter's weights were saved with {saved}, here is {here}; load them into the "
                "model that they were trained in, with the adapter_config.json of their folder"
            )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Mapping, strict: bool, *lists: list[str]
    ) -> None:
        # Adapters that were saved before there were settings have none to compare.
        super()._load_from_state_dict(state_dict, prefix, metadata, False, *lists)


def is_settings(key: str) -> bool:
    """Whether `key` of a file holds Settings."""
    return key.endswith("_settings._extra_state")


def rename(state_dict: Mapping[str, Any], former: Mapping[str, str]) -> dict[str, Any]:
    """A copy of `state_dict` under the present names of its parameters; `former`: former name -> present one."""
    if not former:
        return dict(state_dict)
    pattern = re.compile(rf"(^|\.)({'|'.join(map(re.escape, former))})(?=\.|$)")
    return {pattern.sub(lambda match: match[1] + former[match[2]], key): value for key, value in state_dict.items()}


def check_keys(prefix: str, adapter_name: str, model_keys: Iterable[str], found: Iterable[str]) -> None:
    """ValueError unless the keys `found` in a file are those of the adapter in the model.

    Args:
        prefix: of the method's parameters.
        model_keys: of the model's state dict.
        found: of the file, with the adapter's name in them as in the model.

    Raises:
        ValueError: it names the keys that the file lacks, and those that the model does not know.
    """
    model_keys, found = set(model_keys), set(found)
    parameter = re.compile(rf"(^|\.){re.escape(prefix)}\w+\.{re.escape(adapter_name)}$")
    missing = {key for key in model_keys if parameter.search(key)} - found
    # With embeddings PEFT saves what modules_to_save holds a second time.
    known = model_keys | {key.replace(f".{adapter_name}.", ".") for key in model_keys & found}
    unexpected = {key for key in found - known if key.removeprefix("base_model.model.") not in known}
    parts = [(missing, "lacks"), (unexpected, "has, for no place in this model,")]
    wrong = "; it ".join(f"{verb} {_listed(keys)}" for keys, verb in parts if keys)
    if wrong:
        raise ValueError(
            f"the file of adapter {adapter_name!r} does not fit: it {wrong}. Is it an adapter of another model, of "
            "other target_modules, or incomplete?"
        )


def _listed(keys: Iterable[str], most: int = 4) -> str:
    names = sorted(keys)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
