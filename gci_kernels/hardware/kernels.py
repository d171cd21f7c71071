"""The registry of GPU kernels.

Each op declares its own in `kernels.py` beside them, and gci_kernels/ops/__init__.py imports these declarations. Proof
records, the self check, `gci-kernels info`, `verify` and `tune`, and the benchmark's proof are loops over it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gci_kernels.hardware.stages import Stage

Language = Literal["triton", "cuda"]
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer: x [tokens, depth], W [width, depth], `rank` adapter columns, `experts` router rows."""

    tokens: int
    depth: int
    width: int
    rank: int
    experts: int
    top_k: int  # of the experts, kept
    rows: int = 0  # of W, trained; a layer with such rows has no adapter columns


class Comparison(NamedTuple):
    """What a check compares: named tensors on the kernel's device.

    Attributes:
        kernel: runs the kernel in every way that the op calls it, on inputs made before; called twice.
        plain: the same by the op's library form, on the same inputs in the same dtype.
        truth: the same in float64, on the same rounded inputs.
    """

    kernel: Callable[[], Outputs]
    plain: Outputs
    truth: Outputs


@dataclass(frozen=True)
class LaunchConfig:
    """The launch configuration of one launch of a kernel.

    Attributes:
        name: of the launch; unique over all kernels.
        config_class: the frozen dataclass of its configurations, whose fields are numbers.
        choose: pure function of sizes, dtype and chip; None, where it may return it, says that the launch is not used.
        candidates: field -> values that `gci-kernels tune` tries, in this order; empty: it is never tuned.
    """

    name: str
    config_class: type
    choose: Callable[..., object]
    candidates: Mapping[str, tuple[object, ...]] = field(default_factory=dict)


Check = Callable[[Shape, torch.dtype, torch.device], Comparison]
Stages = Callable[[Shape, torch.dtype, torch.device], dict[str, Stage]]


def no_stages(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Stage]:
    """The stages of a kernel that is not timed."""
    return {}


@dataclass(frozen=True)
class Kernel:
    """One kernel, as far as code outside its op needs to know it.

    It is proved by variant: the dtype of x, with or without dropout.

    Attributes:
        name: as users see it in `gci-kernels info`, and as plans ask for it.
        files: paths inside the package of all source files that its results depend on; a record of its proof counts
            as long as none has changed. What CUDA C++ was built from is added by the record itself.
        check: makes the inputs of one shape and dtype on a device, for the self check.
        check_dropout: the same of what the kernel does with dropout; None: it has no such variant.
        launches: those with a launch configuration; none in CUDA C++.
        language: what it is written in.
        stages: the stages of a layer by which the kernel is timed, by name; those that such a layer has.
        least: without stages, the fewest tokens for which "auto" takes the kernel.
        needs: kernels that run in the same call; tests prove this kernel only where theirs pass too.
    """

    name: str
    files: tuple[str, ...]
    check: Check
    launches: tuple[LaunchConfig, ...] = ()
    language: Language = "triton"
    stages: Stages = no_stages
    needs: tuple[str, ...] = ()
    check_dropout: Check | None = None
    least: int = 1

    @property
    def timed(self) -> bool:
        """Whether it has stages, by which it is compared with the library."""
        return self.stages is not no_stages


#: Every registered kernel by its name, in the order of registration. Only :func:`register` writes to it.
KERNELS: dict[str, Kernel] = {}
#: Every launch of a registered kernel by its name, and its kernel.
LAUNCHES: dict[str, tuple[Kernel, LaunchConfig]] = {}


def register(kernel: Kernel) -> None:
    """Make `kernel` known.

    Raises:
        ValueError: its name, or that of one of its launches, is taken.
    """
    if kernel.name in KERNELS:
        raise ValueError(
            f"a GPU kernel named {kernel.name!r} is registered already, made of {', '.join(KERNELS[kernel.name].files)}"
            "; register each kernel once, and give another kernel another name"
        )
    for launch in kernel.launches:
        if launch.name in LAUNCHES:
            raise ValueError(
                f"a launch named {launch.name!r} is registered already, by the GPU kernel "
                f"{LAUNCHES[launch.name][0].name!r}; give the one of {kernel.name!r} another name"
            )
    KERNELS[kernel.name] = kernel
    LAUNCHES.update({launch.name: (kernel, launch) for launch in kernel.launches})


def get(name: str) -> Kernel:
    """The kernel of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in KERNELS:
        raise ValueError(
            f"no GPU kernel is named {name!r}; there are {', '.join(KERNELS)}. Another one is registered with "
            "gci_kernels.hardware.register"
        )
    return KERNELS[name]


def get_launch(name: str) -> tuple[Kernel, LaunchConfig]:
    """The launch of that name, with its kernel.

    Raises:
        ValueError: there is none.
    """
    if name not in LAUNCHES:
        raise ValueError(f"no launch of a GPU kernel is named {name!r}; there are {', '.join(LAUNCHES)}")
    return LAUNCHES[name]


def names(language: Language) -> tuple[str, ...]:
    """The kernels written in `language`, in the order of registration."""
    return tuple(kernel.name for kernel in KERNELS.values() if kernel.language == language)
