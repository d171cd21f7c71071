"""`gci-kernels verify`: every implementation that can run here against the float64 reference, forward and gradients."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gci_kernels import ops
from gci_kernels.accuracy import Check, error_bound, relative_error
from gci_kernels.impl import native_obstacle, triton_obstacle
from gci_kernels.ops.decode import Group, find_step, plan_groups
from gci_kernels.ops.row_linear.plan import NO_NATIVE
from gci_kernels.ops.upcast import upcast_obstacle

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IMPLS = ("aten", "upcast", "native", "triton")


@dataclass(frozen=True)
class Case:
    """One call of an op over x [tokens, in]: "lora", "loramoe", "alora" or "loki", whose `r` is its active rows.

    `step`: a decoding step, which has no gradients and is C++ and CUDA C++ alone; of ALoRA the new tokens of as many
    sequences, whose past is all before.
    """

    method: str
    tokens: int
    in_features: int
    out_features: int
    r: int
    experts: int = 1
    top_k: int | None = None
    heads: int = 1
    dropout_p: float = 0.0
    step: bool = False

    def __str__(self) -> str:
        size = {"loramoe": f"{self.experts}x{self.r}", "loki": f"{self.r} rows"}.get(self.method, f"r={self.r}")
        more = {"loramoe": f" top_k={self.top_k}", "alora": f" {self.heads} heads"}.get(self.method, "")
        shape = f"T={self.tokens} {self.in_features}->{self.out_features}"
        return f"{self.method} {size}{more} {shape} " + ("decoding" if self.step else f"p={self.dropout_p}")


# Odd sizes, one token, one expert, larger than a tile.
CASES = (
    Case("lora", 130, 67, 45, 16),
    Case("loramoe", 1, 64, 48, 4, experts=8),
    Case("loramoe", 130, 67, 45, 4, experts=8),
    Case("loramoe", 37, 33, 130, 3, experts=5, top_k=2),
    Case("loramoe", 257, 1100, 96, 16),
    Case("alora", 130, 67, 45, 16, heads=4),
    Case("alora", 33, 64, 48, 6, heads=2, dropout_p=0.25),
    Case("loki", 130, 67, 45, 9),
    Case("loki", 1, 64, 48, 48),
    Case("loramoe", 64, 96, 80, 4, experts=6, dropout_p=0.25),
    Case("lora", 1, 67, 145, 16, step=True),
    Case("loramoe", 8, 130, 77, 4, experts=8, step=True),
    Case("loramoe", 16, 67, 45, 3, experts=5, top_k=2, step=True),
    Case("alora", 3, 67, 45, 16, heads=4, step=True),
)
_PAST = 70  # tokens before an ALoRA step's own


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The op's tensor arguments by name; no term of the result drowns another."""
    generator = torch.Generator().manual_seed(0)
    width, fan_in = case.r * case.experts, case.in_features**-0.5

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    tensors = {
        "x": draw(case.tokens, case.in_features),
        "weight": draw(case.out_features, case.in_features, scale=fan_in),
        "bias": draw(case.out_features),
    }
    if case.method == "loki":
        positions = torch.randperm(case.out_features, generator=generator)[: case.r].to(device)
        active = {"active_weight": draw(case.r, case.in_features, scale=fan_in), "active_bias": draw(case.r)}
        return tensors | active | {"positions": positions}
    tensors |= {
        "A": draw(width, case.in_features, scale=fan_in),
        "B": draw(case.out_features, width, scale=width**-0.5),
    }
    if case.method == "loramoe":
        tensors["router"] = draw(case.experts, case.in_features, scale=fan_in)
    if case.method == "alora":
        tensors["qkv"] = draw(3 * case.r, case.r, scale=case.r**-0.5)
    return tensors


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in float64."""
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def run_case(case: Case, tensors: dict[str, Tensor], impl: str) -> dict[str, Tensor]:
    """The outputs and every gradient of one case, for a fixed random dout and a fixed dropout seed."""
    if case.step:
        with torch.no_grad():
            return _step(case, tensors, impl)
    frozen = ("weight", "bias", "positions") if case.method == "loki" else ()
    leaves = {name: t.clone().requires_grad_(name not in frozen) for name, t in tensors.items()}
    torch.manual_seed(1)
    outputs = _outputs(case, leaves, impl)
    used = {name: output for name, output in outputs.items() if output.requires_grad}
    generator = torch.Generator().manual_seed(2)
    douts = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in used.values()]
    torch.autograd.backward(list(used.values()), douts)
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {name: t.detach() for name, t in (outputs | gradients).items()}


def _outputs(case: Case, leaves: dict[str, Tensor], impl: str) -> dict[str, Tensor]:
    if case.method == "loki":
        return {"y": ops.loki_linear(**leaves, impl=impl)}
    options = dict(scaling=2.0, dropout_p=case.dropout_p, impl=impl)
    if case.method == "lora":
        return {"y": ops.lora_linear(**leaves, **options)}
    if case.method == "loramoe":
        return dict(zip(("y", "gates"), ops.loramoe_linear(**leaves, top_k=case.top_k, **options), strict=True))
    return dict(zip(("y", "kv"), ops.alora_linear(**leaves, num_heads=case.heads, **options), strict=True))


def _step(case: Case, t: dict[str, Tensor], impl: str) -> dict[str, Tensor]:
    """One token of each sequence; the reference in full, and the kernel over a cache with places to spare."""
    x, weight, bias, A, B, qkv, heads = t["x"], t["weight"], t["bias"], t["A"], t["B"], t.get("qkv"), case.heads
    past = None
    if qkv is not None:
        generator = torch.Generator().manual_seed(3)
        past = torch.randn(case.tokens, _PAST, 2 * case.r, generator=generator, dtype=torch.float64).to(x)
    if impl == "reference":
        if past is None:
            return {"y": _outputs(case, t, impl)["y"]}
        options = dict(num_heads=heads, scaling=2.0, sequence=ops.Sequence(None, _PAST), past=past, impl=impl)
        y, kv = ops.alora_linear(x[:, None], weight, bias, A, qkv, B, **options)
        return {"y": y[:, 0], "kv": kv[:, 0]}
    group = Group(A, B, 2.0, 0, case.tokens, t.get("router"), case.top_k, qkv, heads)
    step = find_step(x, weight, bias, (group,))
    if past is None:
        return {"y": step.run(x)}
    cache = torch.cat((past, past.new_full((case.tokens, 2, 2 * case.r), float("nan"))), 1)
    filled = torch.tensor([_PAST], dtype=torch.int32, device=x.device)
    return {"y": step.attend(x, None, cache, filled, None), "kv": cache[:, _PAST]}


def step_obstacle(case: Case, impl: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `impl` takes no decoding step there, or None where it does."""
    if impl != "native":
        return "steps are C++ and CUDA C++"
    tensors = make_inputs(case, dtype, device)
    group = Group(tensors["A"], tensors["B"], 2.0, 0, case.tokens, tensors.get("router"), None, tensors.get("qkv"))
    if plan_groups((group,), case.tokens, dtype, torch.device(device).type) is None:
        return f"no kernel takes a step of {dtype} on {device}"
    return None


def obstacle(impl: str, device: str, dtype: torch.dtype, method: str = "lora") -> str | None:
    """Why `impl` of a method's op cannot run there, or None where it can."""
    if method == "loki" and impl == "native":
        return NO_NATIVE
    asked = {"native": native_obstacle, "triton": triton_obstacle, "upcast": upcast_obstacle}.get(impl)
    return None if asked is None else asked(torch.device(device).type, dtype)


def check_case(case: Case, dtype: torch.dtype, impl: str, device: str) -> list[Check]:
    """The outputs and every gradient of one case.

    Truth is the reference in float64 on the same rounded inputs; the bound is twice the error that the reference itself
    makes at the working dtype, plus that dtype's rounding.
    """
    tensors = make_inputs(case, dtype, device)
    truth = run_case(case, widened(tensors), "reference")
    plain, actual = (run_case(case, tensors, each) for each in ("reference", impl))
    return [
        Check(
            str(case), impl, str(dtype).removeprefix("torch."), name,
            relative_error(actual[name], truth[name]),
            error_bound(relative_error(plain[name], truth[name]), dtype),
        )
        for name in truth
    ]  # fmt: skip


def verify(device: str = "cpu") -> Iterator[list[Check]]:
    """One list of checks for each case, dtype and implementation that can run on `device`."""
    for case, dtype, impl in itertools.product(CASES, DTYPES, IMPLS):
        if case.step:
            reason = step_obstacle(case, impl, device, dtype)
        else:
            reason = obstacle(impl, device, dtype, case.method)
        if reason is None:
            yield check_case(case, dtype, impl, device)
