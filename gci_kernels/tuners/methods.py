"""The package's methods among PEFT's: what their types are in memory, and what adapter_config.json calls them."""

import enum
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING


class Method(str, enum.Enum):
    """`peft_type` of the package's configs: PEFT and transformers use it as they use their own peft.PeftType.

    As there, a member equals its name as a string, has the same hash, and is that string in JSON.
    """

    GCI_LORAMOE = "GCI_LORAMOE"
    GCI_ALORA = "GCI_ALORA"
    GCI_LOKI = "GCI_LOKI"

    @property
    def in_file(self) -> str:
        """What adapter_config.json says: where gci_kernels has not been imported, PEFT's KeyError names it so."""
        return f"gci_kernels.{self.value}"


def register(config: Any, tuner: Any) -> None:
    """Makes the method known to PEFT: by its type, and by both names that a saved config may have.

    Adapters that were saved before `in_file` have the type's own name.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[config.method] = config
    PEFT_TYPE_TO_CONFIG_MAPPING[config.method.in_file] = config
    PEFT_TYPE_TO_TUNER_MAPPING[config.method] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[config.method] = tuner.prefix
