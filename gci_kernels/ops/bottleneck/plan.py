"""Which implementation runs each stage of the bottleneck: a pure function of tokens, dtype, device, instruction set."""

import bisect
import functools
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
# packing the small operand of `project` is too much for a few tokens. Without AVX2, the library is ahead. `expand` is
# the library's in float32: it adds the base product to the adapter's, and no kernel of ours gained on that.
# In bfloat16 the kernels are as fast as the library and leave their sums unrounded, which `expand` rounds either way;
# on AMX `reduce` takes up to a third longer than the library's, the price of sums that are not rounded.
_FLOAT32 = {"project": (256, _ANY), "reduce": (64, _ANY)}
_BFLOAT16 = {"project": (0, _ANY), "expand": (0, 32), "reduce": (0, _ANY)}

# The same for the Triton kernels on GPUs: the least tokens at which a stage is taken. Nothing is measured yet: these
# are predictions. A stage that only reads and writes wins once its launch is not all of its cost. Below that, and in
# generation, the library's products stay until there are kernels for a few tokens. The base product has to fill the
# chip before one reading and writing of y less counts; in float32, without matrix units, the library is better tuned.
_TRITON_FROM = dict.fromkeys((*HALVES, torch.float32), 16)
_TRITON_EXPAND_FROM = dict.fromkeys(HALVES, 512)

# The numbers of tokens at which a plan may change: between two of them all calls have the same one.
_EDGES = sorted(
    {edge for wins in (_FLOAT32, _BFLOAT16) for low, high in wins.values() for edge in (low, high + 1)}
    | {*_TRITON_FROM.values(), *_TRITON_EXPAND_FROM.values()}
    | {start for start in (upcast_from(dtype, native.ISA) for dtype in HALVES) if start}
)


def prefers_triton(stage: str, tokens: int, dtype: torch.dtype) -> bool:
    """Whether a stage, a field of Plan, is expected to be faster in Triton than in the library, on a GPU."""
    starts = _TRITON_EXPAND_FROM if stage == "expand" else _TRITON_FROM
    return tokens >= starts.get(dtype, _ANY)


# What plan_for has answered: it is asked in every call of a layer.
_plans: dict[tuple, Plan] = {}


def plan_for(impl: str, tokens: int, dtype: torch.dtype, device_type: str, mixer: str) -> Plan:
    """:func:`choose_plan` on this machine, remembered for each class of numbers of tokens.

    On a GPU "auto" is remembered once every kernel that it asks about has a lasting answer there: kernels prove
    themselves as they are first used.
    """
    state = None if device_type != "cuda" or impl != "auto" else _gpu_state(mixer)
    key = impl, bisect.bisect(_EDGES, tokens), dtype, device_type, mixer
    plan = _plans.get((key, state))
    if plan is None:
        plan = choose_plan(impl, tokens, dtype, device_type, mixer)
        if state == _UNSETTLED:  # until now: choosing has asked
            state = _gpu_state(mixer)
        if state != _UNSETTLED:
            _plans[key, state] = plan
    return plan


_UNSETTLED = (-1, -1)
_KERNELS = ("project", "expand", "reduce", "dropout")


def _gpu_state(mixer: str) -> tuple[int, int]:
    """What a plan of "auto" on a GPU depends on beside its arguments: the current GPU, and what is proved there."""
    kernel = find(mixer).kernel
    index = hardware.records.settled(_KERNELS if kernel is None else (*_KERNELS, kernel))
    return _UNSETTLED if index is None else (index, hardware.records.version)


def choose_plan(
    impl: str, tokens: int, dtype: torch.dtype, device_type: str, mixer: str = "identity", *,
    isa: str | None = None, proved: frozenset[str] | None = None, library: bool | None = None,
) -> Plan:  # fmt: skip
    """The plan for x [tokens, in] of `dtype` on `device_type`; a pure function, once isa, proved and library are given.

    "native" takes every C++ kernel that there is for `dtype`, "triton" every Triton kernel, "auto" those that are no
    slower than the library; of the Triton ones, those alone that have proved themselves on the GPU. A mixer that lacks
    an implementation runs in its library form.

    Args:
        mixer: the name of a registered one.
        isa: the CPU's instruction set; None: this one's.
        library: whether PyTorch has a fast product of `dtype` on this CPU; None: it is asked.
        proved: the kernels, keys of hardware.KERNELS, that work on the GPU; None: hardware.proves is asked about the
            current one, which may check a kernel at its first use.

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
        return _gpu_plan(tokens, dtype, mixer, proved)
    isa = native.ISA if isa is None else isa
    start = upcast_from(dtype, isa, library) if impl == "auto" and device_type == "cpu" else None
    other = "aten" if native_obstacle(device_type, dtype) else "native"
    if impl == "upcast" or start is not None and tokens >= start:
        return Plan("upcast", _mix(mixer, other), "upcast", "upcast", other)
    return Plan(*[other] * len(Plan._fields)) if other == "aten" else _cpu_plan(impl, tokens, dtype, isa, mixer)


def _mix(mixer: str, impl: str) -> str:
    """`impl` where the mixer has it, else the library's form."""
    return impl if impl in find(mixer).implementations else "aten"


def _gpu_plan(tokens: int, dtype: torch.dtype, mixer: str, proved: frozenset[str] | None) -> Plan:
    def choice(stage: str, kernel: str | None) -> str:
        if kernel not in hardware.KERNELS or not prefers_triton(stage, tokens, dtype):
            return "aten"
        return "triton" if (hardware.proves(kernel) if proved is None else kernel in proved) else "aten"

    mix = choice("mix", find(mixer).kernel)
    return Plan(choice("project", "project"), mix, *(choice(stage, stage) for stage in ("expand", "reduce", "dropout")))


def _cpu_plan(impl: str, tokens: int, dtype: torch.dtype, isa: str, mixer: str) -> Plan:
    half = dtype == torch.bfloat16 and isa in ("avx512bf16", "amx")
    kernels = _BFLOAT16 if half else _FLOAT32 if dtype == torch.float32 else {}
    vectors = isa in ("avx2", "avx512", "avx512bf16", "amx")

    def choice(stage: str) -> str:
        low, high = kernels.get(stage, (1, 0))
        wins = vectors and low <= tokens <= high
        return "native" if stage in kernels and (impl == "native" or wins) else "aten"

    return Plan(choice("project"), _mix(mixer, "native"), choice("expand"), choice("reduce"), "native")
