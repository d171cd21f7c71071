"""Which implementation runs each stage of the bottleneck: a pure function of tokens, dtype, device, instruction set."""

import bisect
import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch

from gci_kernels import hardware, native
from gci_kernels.impl import HALVES, check_impl, check_runs, native_obstacle, triton_obstacle
from gci_kernels.ops.bottleneck.registry import find
from gci_kernels.ops.upcast import upcast_from


class Plan(NamedTuple):
    """One implementation for each stage, of gci_kernels.impl.IMPLS; printable, and a string for the op's schema."""

    project: str  # x @ [A; joined weights].T and dY @ B
    mix: str  # the mixer, forward and backward
    expand: str  # y = u @ B.T + x @ W.T and dX = dh @ [A; joined weights] + dY @ W
    reduce: str  # dA = dh.T @ x and dB.T = u.T @ dY
    dropout: str

    @property
    def key(self) -> str:
        """The plan as a string without spaces."""
        return "/".join(self)

    @staticmethod
    @functools.cache
    def from_key(key: str) -> "Plan":
        """The plan whose :attr:`key` this is."""
        return Plan(*key.split("/"))

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self._asdict().items())


_ANY = 2**62
# The numbers of tokens, from and to, at which a skinny kernel beats the library's product; measured with 2 threads at
# 2048x2048 and 576x1536, R = 8 to 72, in float32 on AVX2 as well: there the library needs up to twice the time, but
# for a few tokens, packing the small operand of `project` takes too long. Without AVX2, the library is faster. In
# float32 `expand` is the library's, which adds the base product onto the adapter's: no kernel of ours was faster.
# In bfloat16 the kernels are as fast as the library and leave their sums unrounded, which `expand` rounds either way;
# on AMX `reduce` takes up to a third longer than the library's, the price of sums that are not rounded.
_FLOAT32 = {"project": (256, _ANY), "reduce": (64, _ANY)}
_BFLOAT16 = {"project": (0, _ANY), "expand": (0, 32), "reduce": (0, _ANY)}

# The numbers of tokens at which a plan may change: between two of them all calls have the same one.
_EDGES = sorted(
    {edge for wins in (_FLOAT32, _BFLOAT16) for low, high in wins.values() for edge in (low, high + 1)}
    | {start for start in (upcast_from(dtype, native.ISA) for dtype in HALVES) if start}
)


# What plan_for has returned: every call of a layer asks it.
_plans: dict[tuple, Plan] = {}


def plan_for(
    impl: str, tokens: int, dtype: torch.dtype, device_type: str, mixer: str, *, device: torch.device, dropout: bool
) -> Plan:
    """:func:`choose_plan` on this machine, remembered for each class of numbers of tokens.

    On a GPU "auto" is remembered by which kernels it takes, once each of them has a lasting answer there: kernels are
    proved and timed as they are first used.
    """
    tokens_class: object = None
    if device_type != "cuda" or impl != "auto" or triton_obstacle(device_type, dtype) is not None:
        tokens_class = bisect.bisect(_EDGES, tokens)
    else:
        tokens_class = hardware.settled(_kernels_once(mixer, dropout), tokens, dtype, device, dropout)
    key = impl, tokens_class, dtype, device_type, mixer, dropout
    plan = _plans.get(key)
    if plan is None:
        plan = choose_plan(impl, tokens, dtype, device_type, mixer, device=device, dropout=dropout)
        if tokens_class is not None:
            _plans[key] = plan
    return plan


def _kernels(mixer: str, dropout: bool) -> tuple[str, ...]:
    """The GPU kernels that a plan of "auto" asks about."""
    made = ("project", "expand", "reduce", *(("dropout",) if dropout else ()), find(mixer).kernel)
    return tuple(kernel for kernel in made if kernel in hardware.KERNELS)


_kernels_once = functools.cache(_kernels)  # not for choose_plan, which torch.compile traces


def choose_plan(
    impl: str, tokens: int, dtype: torch.dtype, device_type: str, mixer: str = "identity", *,
    device: torch.device | None = None, dropout: bool = True, isa: str | None = None,
    starts: Mapping[str, int | None] | None = None, library: bool | None = None,
) -> Plan:  # fmt: skip
    """The plan for x [tokens, in] of `dtype` on `device_type`; a pure function, once isa, starts and library are given.

    "native" takes every C++ kernel that there is for `dtype`, "triton" every Triton kernel, "auto" those that are no
    slower than the library; of the Triton ones, those alone that were proved and measured on the GPU. A mixer that
    lacks an implementation runs in its library form.

    Args:
        mixer: the name of a registered one.
        device: x's, on a GPU; None: the current GPU.
        dropout: whether x is dropped out; without, no kernel for dropout is asked about on a GPU.
        isa: the CPU's instruction set; None: this one's.
        starts: kernel, a key of hardware.KERNELS -> the fewest tokens from which it is no slower than the library on
            the GPU, None: it is slower; for those that are proved. None: hardware.start is asked, which may check and
            time a kernel at its first use.
        library: whether PyTorch has a fast product of `dtype` on this CPU; None: it is asked.

    Raises:
        ValueError: an implementation is asked for that is unknown or cannot run.
    """
    check_impl(impl)
    check_runs(impl, device_type, dtype)
    if impl in ("aten", "reference"):
        return Plan(*[impl] * len(Plan._fields))
    if impl == "triton":
        return Plan(impl, _mix(mixer, impl), impl, impl, impl)
    if impl == "auto" and device_type == "cuda" and triton_obstacle(device_type, dtype) is None:
        return _gpu_plan(tokens, dtype, mixer, device, dropout, starts)
    isa = native.ISA if isa is None else isa
    start = upcast_from(dtype, isa, library) if impl == "auto" and device_type == "cpu" else None
    other = "aten" if native_obstacle(device_type, dtype) else "native"
    if impl == "upcast" or start is not None and tokens >= start:
        return Plan("upcast", _mix(mixer, other), "upcast", "upcast", other)
    return Plan(*[other] * len(Plan._fields)) if other == "aten" else _cpu_plan(impl, tokens, dtype, isa, mixer)


def _mix(mixer: str, impl: str) -> str:
    """`impl` where the mixer has it, else the library's form."""
    return impl if impl in find(mixer).implementations else "aten"


def _gpu_plan(
    tokens: int, dtype: torch.dtype, mixer: str, device: torch.device | None, dropout: bool,
    starts: Mapping[str, int | None] | None,
) -> Plan:  # fmt: skip
    taken = [
        kernel for kernel in _kernels(mixer, dropout)
        if hardware.takes(kernel, tokens, dtype, device, dropout=dropout, starts=starts)
    ]  # fmt: skip
    kernels = ("project", find(mixer).kernel, "expand", "reduce", "dropout")
    return Plan(*("triton" if kernel in taken else "aten" for kernel in kernels))


def _cpu_plan(impl: str, tokens: int, dtype: torch.dtype, isa: str, mixer: str) -> Plan:
    half = dtype == torch.bfloat16 and isa in ("avx512bf16", "amx")
    kernels = _BFLOAT16 if half else _FLOAT32 if dtype == torch.float32 else {}
    vectors = isa in ("avx2", "avx512", "avx512bf16", "amx")

    def choice(stage: str) -> str:
        low, high = kernels.get(stage, (1, 0))
        wins = vectors and low <= tokens <= high
        return "native" if stage in kernels and (impl == "native" or wins) else "aten"

    return Plan(choice("project"), _mix(mixer, "native"), choice("expand"), choice("reduce"), "native")
