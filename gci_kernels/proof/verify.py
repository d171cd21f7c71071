"""`gci-kernels verify`: every implementation that can run here against the float64 reference, forward and gradients."""

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from gci_kernels import impl as implementations
from gci_kernels import ops
from gci_kernels.accuracy import Check, error_bound, relative_error
from gci_kernels.ops import Mixer
from gci_kernels.ops.bottleneck.mixers import IDENTITY
from gci_kernels.ops.decode import Group, find_step, plan_groups
from gci_kernels.ops.row_linear.plan import NO_NATIVE
from gci_kernels.tuners import METHODS, Method

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IMPLS = ("aten", "upcast", "native", "triton")


@dataclass(frozen=True)
class Case:
    """One call of an op over x [tokens, in].

    Attributes:
        method: "lora", "loki", whose `r` is its active rows, or the name of a registered method in small letters.
        config: of a registered method; None: made of r, experts, top_k and heads, where it has them.
        step: a decoding step, which has no gradients and is C++ and CUDA C++ alone; of ALoRA the new tokens of as many
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
    config: Any = field(default=None, compare=False)

    def __str__(self) -> str:
        size = f"{self.r} rows" if self.method == "loki" else f"r={self.r}"
        if self.method not in ("lora", "loki"):
            method, config = self.registered()
            size = method.describe(config) + (f" top_k={self.top_k}" if self.top_k else "")
        shape = f"T={self.tokens} {self.in_features}->{self.out_features}"
        return f"{self.method} {size} {shape} " + ("decoding" if self.step else f"p={self.dropout_p}")

    def registered(self) -> tuple[Method, Any]:
        """The method, and its config for this case."""
        method = next(each for name, each in METHODS.items() if name.lower() == self.method)
        if self.config is not None:
            return method, self.config
        known = {each.name for each in fields(method.config)}
        given = {"num_experts": self.experts, "top_k": self.top_k, "num_heads": self.heads}
        return method, method.config(r=self.r, **{name: value for name, value in given.items() if name in known})

    @property
    def mixer(self) -> Mixer:
        """What stands between A and B."""
        return IDENTITY if self.method == "lora" else self.registered()[0].mixer

    @property
    def numbers(self) -> tuple[int, ...]:
        """The mixer's own settings."""
        if self.method == "lora":
            return ()
        method, config = self.registered()
        return method.settings(config)

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the adapter's tensors by name."""
        if self.method == "lora":
            return {"A": (self.r, self.in_features), "B": (self.out_features, self.r)}
        method, config = self.registered()
        made = method.parameters(config, self.in_features, self.out_features)
        return {name: tuple(tensor.shape) for name, tensor in made.items()}


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


def cases() -> tuple[Case, ...]:
    """:data:`CASES`, and the example of every registered method that none of them is of."""
    covered = {case.method for case in CASES}
    others = [method for name, method in METHODS.items() if name.lower() not in covered]
    examples = [Case(m.name.lower(), 130, 67, 45, m.example.r, config=m.example) for m in others]
    return (*CASES, *examples, *(replace(case, dropout_p=0.25) for case in examples))


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The op's tensor arguments by name; no term of the result drowns another."""
    generator = torch.Generator().manual_seed(0)
    fan_in = case.in_features**-0.5

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
    return tensors | {name: draw(*shape, scale=shape[1] ** -0.5) for name, shape in case.parameters().items()}


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
    gradients: dict[str, Any] = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {name: t.detach() for name, t in (outputs | gradients).items()}


def _outputs(case: Case, leaves: dict[str, Any], impl: str) -> dict[str, Tensor]:
    if case.method == "loki":
        return {"y": ops.loki_linear(**leaves, impl=impl)}
    x, weight, bias, A, B, *weights = (leaves[name] for name in ("x", "weight", "bias", *_adapter(leaves)))
    y, output = ops.bottleneck_linear(
        x, weight, bias, A, B, *weights, mixer=case.mixer, settings=case.numbers, scaling=2.0, dropout_p=case.dropout_p,
        impl=impl,
    )  # fmt: skip
    return {"y": y} if output is None else {"y": y, "output": output}


def _adapter(tensors: dict[str, Tensor]) -> list[str]:
    """The names of A, B and the mixer's weights, where it has any."""
    return ["A", "B", *(name for name in tensors if name not in ("x", "weight", "bias", "A", "B"))]


def _group(case: Case, tensors: dict[str, Tensor]) -> Group | None:
    """The adapter as a decoding step takes it; None where the mixer has no such form."""
    A, B, *weights = (tensors[name] for name in _adapter(tensors))
    decode = case.mixer.decode
    if decode is None:
        return None
    return Group(A, B, 2.0, 0, case.tokens, *decode(weights[0] if weights else None, case.numbers))


def _step(case: Case, t: dict[str, Tensor], impl: str) -> dict[str, Tensor]:
    """One token of each sequence; the reference in full, and the kernel over a cache with places to spare."""
    x, weight, bias, past = t["x"], t["weight"], t["bias"], None
    if case.method == "alora":
        generator = torch.Generator().manual_seed(3)
        past = torch.randn(case.tokens, _PAST, 2 * case.r, generator=generator, dtype=torch.float64).to(x)
    if impl == "reference":
        if past is None:
            return {"y": _outputs(case, t, impl)["y"]}
        options: Any = dict(num_heads=case.heads, scaling=2.0, sequence=ops.Sequence(None, _PAST), past=past, impl=impl)
        y, kv = ops.alora_linear(x[:, None], weight, bias, t["A"], t["qkv"], t["B"], **options)
        return {"y": y[:, 0], "output": kv[:, 0]}
    group: Any = _group(case, t)
    step: Any = find_step(x, weight, bias, (group,))
    if past is None:
        return {"y": step.run(x)}
    cache = torch.cat((past, past.new_full((case.tokens, 2, 2 * case.r), float("nan"))), 1)
    filled = torch.tensor([_PAST], dtype=torch.int32, device=x.device)
    return {"y": step.attend(x, None, cache, filled, None), "output": cache[:, _PAST]}


def step_obstacle(case: Case, impl: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `impl` takes no decoding step there, or None where it does."""
    if impl != "native":
        return "steps are C++ and CUDA C++"
    group = _group(case, make_inputs(case, dtype, device))
    if group is None or plan_groups((group,), case.tokens, dtype, torch.device(device)) is None:
        return f"no kernel takes a step of {dtype} on {device}"
    return None


def obstacle(impl: str, device: str, dtype: torch.dtype, method: str = "lora") -> str | None:
    """Why `impl` of a method's op cannot run there, or None where it can."""
    if method == "loki" and impl == "native":
        return NO_NATIVE
    return implementations.obstacle(impl, torch.device(device).type, dtype)


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
    for case, dtype, impl in itertools.product(cases(), DTYPES, IMPLS):
        if case.step:
            reason = step_obstacle(case, impl, device, dtype)
        else:
            reason = obstacle(impl, device, dtype, case.method)
        if reason is None:
            try:
                yield check_case(case, dtype, impl, device)
            except Exception as error:  # a failed check like any other: the rest is still to be checked
                if os.environ.get("GCI_DEBUG") == "1":
                    raise
                raised = f"{type(error).__name__}: {error}"
                yield [Check(str(case), impl, str(dtype).removeprefix("torch."), raised, math.inf, 1.0)]
