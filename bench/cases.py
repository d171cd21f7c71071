"""The layer cases: one linear layer, forward and backward, as the frozen base, in eager PyTorch and in gci_kernels."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gci_kernels import ops

from .baselines import EagerLoRAMoELinear, adapter_leaves, peft_lora_linear, stack

LORA_ALPHA = 32
RANKS = {"lora": (16, 1), "loramoe": (4, 8)}  # method -> rank, number of experts


@dataclass(frozen=True)
class LayerCase:
    """The shape of a layer benchmark."""

    method: str  # "lora" or "loramoe"
    tokens: int
    in_features: int
    out_features: int
    rank: int
    num_experts: int  # 1 for LoRA
    dtype: torch.dtype  # of x, of the base weight and of the output
    adapter_dtype: torch.dtype

    @property
    def name(self) -> str:
        rank = f"{self.num_experts}x{self.rank}" if self.method == "loramoe" else f"r={self.rank}"
        shape = f"T={self.tokens} {self.in_features}x{self.out_features}"
        return f"{self.method} {rank} {shape} {str(self.dtype).removeprefix('torch.')}"


def layer_case(
    method: str, dtype: torch.dtype, adapter_dtype: torch.dtype | None = None, *, quick: bool = False
) -> LayerCase:
    """The case of a method: T=2048 over 2048x2048; `quick`: half the tokens over 1024x1024. Adapters in `dtype` too."""
    tokens, width = (1024, 1024) if quick else (2048, 2048)
    return LayerCase(method, tokens, width, width, *RANKS[method], dtype, adapter_dtype or dtype)


CASES = [layer_case(method, dtype) for method in RANKS for dtype in (torch.float32, torch.bfloat16)]


@dataclass(frozen=True)
class LayerInputs:
    """The tensors of a case, stacked as gci_kernels takes them."""

    x: Tensor  # [T, in], dtype
    weight: Tensor  # [out, in], dtype
    A: Tensor  # [N*r, in], adapter_dtype
    B: Tensor  # [out, N*r], adapter_dtype
    router: Tensor | None  # [N, in], adapter_dtype; None for LoRA
    dy: Tensor  # [T, out], dtype
    scaling: float


def make_inputs(case: LayerCase, device: torch.device, seed: int = 0) -> LayerInputs:
    """Random tensors of the sizes that a trained layer has; B isn't zero, so no gradient is trivially zero."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int, std: float, dtype: torch.dtype = case.adapter_dtype) -> Tensor:
        return (torch.randn(rows, columns, generator=generator, device=device) * std).to(dtype)

    stacked = case.num_experts * case.rank
    fan_in = 1 / math.sqrt(case.in_features)
    return LayerInputs(
        x=normal(case.tokens, case.in_features, 1.0, case.dtype),
        weight=normal(case.out_features, case.in_features, fan_in, case.dtype),
        A=normal(stacked, case.in_features, fan_in),
        B=normal(case.out_features, stacked, 0.02),
        router=normal(case.num_experts, case.in_features, fan_in) if case.method == "loramoe" else None,
        dy=normal(case.tokens, case.out_features, 1.0, case.dtype),
        scaling=LORA_ALPHA / case.rank,
    )


@dataclass(frozen=True)
class LayerVariant:
    """One way to compute a case: its forward, and the leaves that need a gradient, by role."""

    forward: Callable[[], Tensor]
    leaves: dict[str, list[Tensor]]
    dy: Tensor

    def step(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Forward, and backward to every leaf: the thing that is timed."""
        y = self.forward()
        return y, torch.autograd.grad(y, [leaf for leaves in self.leaves.values() for leaf in leaves], self.dy)

    def results(self) -> dict[str, Tensor]:
        """y and the gradient of every role, experts stacked: the things that are compared."""
        y, grads = self.step()
        remaining = iter(grads)
        stacked = {f"d{role}": stack(role, [next(remaining) for _ in leaves]) for role, leaves in self.leaves.items()}
        return {"y": y.detach(), **stacked}


def layer_variants(inputs: LayerInputs) -> dict[str, LayerVariant]:
    """The columns of the table: "frozen" (the base layer with its dX), "eager" and "gci"."""
    return {"frozen": _frozen(inputs), "eager": _eager(inputs), "gci": _gci(inputs)}


def _frozen(inputs: LayerInputs) -> LayerVariant:
    x = inputs.x.clone().requires_grad_()
    return LayerVariant(lambda: nn.functional.linear(x, inputs.weight), {"x": [x]}, inputs.dy)


def _eager(inputs: LayerInputs) -> LayerVariant:
    x = inputs.x.clone().requires_grad_()
    base = nn.Linear(inputs.weight.shape[1], inputs.weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(inputs.weight, requires_grad=False)
    if inputs.router is None:
        layer = peft_lora_linear(base, inputs.A, inputs.B, scaling=inputs.scaling)
    else:
        layer = EagerLoRAMoELinear(base, inputs.A, inputs.B, inputs.router, scaling=inputs.scaling)
    return LayerVariant(lambda: layer(x), {"x": [x], **adapter_leaves(layer)}, inputs.dy)


def _gci(inputs: LayerInputs) -> LayerVariant:
    x, A, B = (tensor.clone().requires_grad_() for tensor in (inputs.x, inputs.A, inputs.B))
    leaves = {"x": [x], "A": [A], "B": [B]}
    if inputs.router is None:

        def forward() -> Tensor:
            return ops.lora_linear(x, inputs.weight, None, A, B, scaling=inputs.scaling)

    else:
        router = inputs.router.clone().requires_grad_()
        leaves["router"] = [router]

        def forward() -> Tensor:
            y, _ = ops.loramoe_linear(x, inputs.weight, None, A, B, router, scaling=inputs.scaling)
            return y

    return LayerVariant(forward, leaves, inputs.dy)
