"""The layer cases: one linear layer, forward and backward, as the frozen base, in eager PyTorch and in gci_kernels."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gci_kernels import ops

from .baselines import EagerALoRALinear, EagerLoRAMoELinear, adapter_leaves, peft_lora_linear, stack
from .roofline import floor_seconds

LORA_ALPHA = 32
RANKS = {"lora": (16, 1), "loramoe": (4, 8), "alora": (16, 1)}  # method -> rank, number of experts
HEADS = 4  # of ALoRA


@dataclass(frozen=True)
class LayerCase:
    """The shape of a layer benchmark."""

    method: str  # a key of RANKS
    tokens: int
    in_features: int
    out_features: int
    rank: int
    num_experts: int  # 1 where there are none
    dtype: torch.dtype  # of x, of the base weight and of the output
    adapter_dtype: torch.dtype

    @property
    def name(self) -> str:
        rank = f"{self.num_experts}x{self.rank}" if self.method == "loramoe" else f"r={self.rank}"
        rank += f" {HEADS} heads" if self.method == "alora" else ""
        shape = f"T={self.tokens} {self.in_features}x{self.out_features}"
        return f"{self.method} {rank} {shape} {str(self.dtype).removeprefix('torch.')}"


def floor_of(case: LayerCase, device: torch.device) -> dict[str, float] | None:
    """The least time of "frozen" and "gci" on `device`; None where it is not known: ALoRA, chips without rates."""
    if case.method == "alora":
        return None
    experts = case.num_experts if case.method == "loramoe" else 0
    shape = (case.tokens, case.in_features, case.out_features, case.rank, experts)
    return floor_seconds(*shape, case.dtype, case.adapter_dtype, device)


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
    router: Tensor | None  # [N, in], adapter_dtype; LoRAMoE's
    qkv: Tensor | None  # [3r, r], adapter_dtype; ALoRA's
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
        qkv=normal(3 * case.rank, case.rank, 1 / math.sqrt(case.rank)) if case.method == "alora" else None,
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
    return {"frozen": frozen_variant(inputs), "eager": eager_variant(inputs), "gci": gci_variant(inputs)}


def frozen_variant(inputs: LayerInputs) -> LayerVariant:
    x = inputs.x.clone().requires_grad_()
    return LayerVariant(lambda: nn.functional.linear(x, inputs.weight), {"x": [x]}, inputs.dy)


def eager_variant(inputs: LayerInputs) -> LayerVariant:
    x = inputs.x.clone().requires_grad_()
    base = nn.Linear(inputs.weight.shape[1], inputs.weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(inputs.weight, requires_grad=False)
    adapter, scaling = (base, inputs.A, inputs.B), inputs.scaling
    if inputs.router is not None:
        layer = EagerLoRAMoELinear(*adapter, inputs.router, scaling=scaling)
    elif inputs.qkv is not None:
        layer = EagerALoRALinear(*adapter, inputs.qkv, num_heads=HEADS, scaling=scaling)
    else:
        layer = peft_lora_linear(*adapter, scaling=scaling)
    return LayerVariant(lambda: layer(x), {"x": [x], **adapter_leaves(layer)}, inputs.dy)


def gci_variant(inputs: LayerInputs, impl: str = "auto") -> LayerVariant:
    x, A, B = (tensor.clone().requires_grad_() for tensor in (inputs.x, inputs.A, inputs.B))
    base, options = (x, inputs.weight, None), dict(scaling=inputs.scaling, impl=impl)
    leaves = {"x": [x], "A": [A], "B": [B]}
    if inputs.router is not None:
        router = inputs.router.clone().requires_grad_()
        leaves["router"] = [router]
        return LayerVariant(lambda: ops.loramoe_linear(*base, A, B, router, **options)[0], leaves, inputs.dy)
    if inputs.qkv is not None:
        qkv = inputs.qkv.clone().requires_grad_()
        leaves["qkv"] = [qkv]
        return LayerVariant(
            lambda: ops.alora_linear(*base, A, qkv, B, num_heads=HEADS, **options)[0], leaves, inputs.dy
        )
    return LayerVariant(lambda: ops.lora_linear(*base, A, B, **options), leaves, inputs.dy)
