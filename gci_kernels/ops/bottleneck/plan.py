"""Which implementation runs each stage of the bottleneck: a pure function of tokens, dtype, device, instruction set."""

import torch

from gci_kernels import hardware, native
from gci_kernels.impl import Plan, native_obstacle, triton_obstacle
from gci_kernels.ops.upcast import upcast_from, upcast_obstacle

_ANY = 2**62
# The numbers of tokens, from and to, at which a skinny kernel beats the library's product; measured with 2 threads at
# 2048x2048 and 576x1536, R = 8 to 72, in float32 on AVX2 as well: there the library needs up to twice the time, but
# packing the small operand of `project` is too much for a few tokens. Without AVX2, the library is ahead. `expand` is
# the library's in float32: it adds the base product to the adapter's, and no kernel of ours gained on that.
# In bfloat16 the kernels are as fast as the library and leave their sums unrounded, which `expand` rounds either way;
# on AMX `reduce` takes up to a third longer than the library's, the price of sums that are not rounded.
_FLOAT32 = {"project": (256, _ANY), "reduce": (64, _ANY)}
_WINS = {
    ("amx", torch.float32): _FLOAT32,
    ("avx512bf16", torch.float32): _FLOAT32,
    ("avx512", torch.float32): _FLOAT32,
    ("avx2", torch.float32): _FLOAT32,
    ("amx", torch.bfloat16): {"project": (0, _ANY), "expand": (0, 32), "reduce": (0, _ANY)},
    ("avx512bf16", torch.bfloat16): {"project": (0, _ANY), "expand": (0, 32), "reduce": (0, _ANY)},
}


# The same for the Triton kernels on GPUs: the least tokens at which a stage is taken. Nothing is measured yet: these
# are predictions. A stage that only reads and writes wins once its launch is not all of its cost. Below that, and in
# generation, the library's products stay until there are kernels for a few tokens. The base product has to fill the
# chip before one reading and writing of y less counts; in float32, without matrix units, the library is better tuned.
_TRITON_FROM = {
    "project": {torch.bfloat16: 16, torch.float16: 16, torch.float32: 16},
    "mix": {torch.bfloat16: 16, torch.float16: 16, torch.float32: 16},
    "expand": {torch.bfloat16: 512, torch.float16: 512},
    "reduce": {torch.bfloat16: 16, torch.float16: 16, torch.float32: 16},
    "dropout": {torch.bfloat16: 16, torch.float16: 16, torch.float32: 16},
}
# mixer -> its kernel in hardware.KERNELS; "identity" has none.
_MIX_KERNELS = {"gate": "gate", "attention": "attention"}


def prefers_triton(stage: str, tokens: int, dtype: torch.dtype) -> bool:
    """Whether a stage, a field of Plan, is expected to be faster in Triton than in the library, on a GPU."""
    return tokens >= _TRITON_FROM[stage].get(dtype, _ANY)


def choose_plan(
    impl: str, *, tokens: int, dtype: torch.dtype, device_type: str, isa: str | None = None,
    mixer: str | None = None, proved: frozenset[str] | None = None, library: bool | None = None,
) -> Plan:  # fmt: skip
    """The plan for x [tokens, in] of `dtype` on `device_type`; a pure function, once isa, proved and library are given.

    "native" takes every C++ kernel that there is for `dtype`, "triton" every Triton kernel, "auto" those that are no
    slower than the library; of the Triton ones, those alone that have proved themselves on the GPU.
    Raises ValueError where an implementation is asked for and cannot run.

    Args:
        isa: the CPU's instruction set; None: this one's.
        library: whether PyTorch has a fast product of `dtype` on this CPU; None: it is asked.
        mixer: the module of ops/bottleneck/mixers, None where it is not known; "auto" on a GPU asks for its kernel.
        proved: the kernels, keys of hardware.KERNELS, that work on the GPU; None: hardware.proves is asked about the
            current one, which may check a kernel at its first use.
    """
    asked = {"triton": triton_obstacle, "upcast": upcast_obstacle}.get(impl, native_obstacle)
    obstacle = asked(device_type, dtype)
    if impl in ("native", "triton", "upcast") and obstacle:
        raise ValueError(f"impl={impl!r} cannot run here: {obstacle}")
    if impl == "triton":
        return Plan(project=impl, mix=impl, expand=impl, reduce=impl, dropout=impl)
    if impl == "auto" and device_type == "cuda" and triton_obstacle(device_type, dtype) is None:
        return _gpu_plan(tokens, dtype, mixer, proved)
    isa = native.ISA if isa is None else isa
    start = upcast_from(dtype, isa, library) if impl == "auto" and device_type == "cpu" else None
    if impl == "upcast" or start is not None and tokens >= start:
        other = "aten" if native_obstacle(device_type, dtype) else "native"
        return Plan(project="upcast", mix=other, expand="upcast", reduce="upcast", dropout=other)
    if impl in ("aten", "reference") or obstacle:
        stage = "reference" if impl == "reference" else "aten"
        return Plan(project=stage, mix=stage, expand=stage, reduce=stage, dropout=stage)
    return _cpu_plan(impl, tokens, dtype, isa)


def _gpu_plan(tokens: int, dtype: torch.dtype, mixer: str | None, proved: frozenset[str] | None) -> Plan:
    def choice(stage: str, kernel: str | None) -> str:
        if kernel not in hardware.KERNELS or not prefers_triton(stage, tokens, dtype):
            return "aten"
        return "triton" if (hardware.proves(kernel) if proved is None else kernel in proved) else "aten"

    return Plan(
        project=choice("project", "project"),
        mix=choice("mix", _MIX_KERNELS.get(mixer)),
        expand=choice("expand", "expand"),
        reduce=choice("reduce", "reduce"),
        dropout=choice("dropout", "dropout"),
    )


def _cpu_plan(impl: str, tokens: int, dtype: torch.dtype, isa: str) -> Plan:
    wins = _WINS.get((isa, dtype), {})
    half = dtype == torch.bfloat16 and isa in ("avx512bf16", "amx")
    exist = {"project", "expand", "reduce"} if half else {"project", "reduce"} if dtype == torch.float32 else set()

    def choice(stage: str) -> str:
        low, high = wins.get(stage, (1, 0))
        return "native" if stage in exist and (impl == "native" or low <= tokens <= high) else "aten"

    return Plan(
        project=choice("project"), mix="native", expand=choice("expand"), reduce=choice("reduce"), dropout="native"
    )
