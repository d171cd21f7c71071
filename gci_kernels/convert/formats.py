"""Records of the formats that a folder can have, and of the conversions between them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gci_kernels.convert.files import Checkpoint
from gci_kernels.tuners.methods import method_type, type_in_file


@dataclass(frozen=True, eq=False)
class Format:
    """What a folder can hold.

    Attributes:
        description: for messages, such as "a GCI_LOKI adapter".
        is_adapter: whether the content of an adapter_config.json belongs to this format; None: no format of adapters.
        is_model: whether a model's tensors belong to this format; None: no format of models, or the plain one.
    """

    description: str
    is_adapter: Callable[[Mapping[str, Any]], bool] | None = None
    is_model: Callable[[Checkpoint], bool] | None = None


@dataclass(frozen=True)
class Converted:
    """What a conversion did: how many modules are adapted, and notes for the user."""

    modules: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversion:
    """One way from a format to another.

    Attributes:
        source, target: the formats.
        to: the target's name on the command line: "ours", "published" or "plain".
        run: a function of two folders, to read and to make. Its keyword arguments are the options that it takes; those
            without a default are needed.
    """

    source: Format
    to: str
    target: Format
    run: Callable[..., Converted]

    @property
    def options(self) -> dict[str, bool]:
        """The options that it takes, but for `progress`, and whether each is needed."""
        found = inspect.signature(self.run).parameters.values()
        return {p.name: p.default is p.empty for p in found if p.kind is p.KEYWORD_ONLY and p.name != "progress"}


PLAIN = Format("a plain model")


def adapter_format(config_cls: Any) -> Format:
    """The format of a method's own adapters, by the configuration class that it registers with PEFT."""
    names = (method_type(config_cls.method).value, type_in_file(config_cls))
    return Format(f"a {names[0]} adapter", is_adapter=lambda config: config.get("peft_type") in names)
