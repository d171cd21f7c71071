"""The layer cases: one linear layer, forward and backward, as the frozen base, in eager PyTorch and in gci_kernels."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gci_kernels import METHODS as REGISTERED
from gci_kernels import ALoRAConfig, LoRAMoEConfig, Method, ops
from gci_kernels.hardware import Shape

from . import costs
from .baselines import EagerLoKILinear, adapter_leaves, eager_layer, stack

LORA_ALPHA = 32
HEADS = 4  # of ALoRA
QUOTA = 10  # percent of the rows that LoKI trains
# What is measured of the package's own methods; of those that others register, their example.
_CONFIGS = {
    "loramoe": LoRAMoEConfig(r=4, num_experts=8, lora_alpha=LORA_ALPHA),
    "alora": ALoRAConfig(r=16, num_heads=HEADS, lora_alpha=LORA_ALPHA),
}
#: The package's own methods.
METHODS = ("lora", *_CONFIGS, "loki")


def all_methods() -> tuple[str, ...]:
    """:data:`METHODS`, and those that others have registered."""
    return (*METHODS, *(name for name in registered_methods() if name not in METHODS))


def registered_methods() -> dict[str, Method]:
    """The registered bottleneck methods by their name in small letters."""
    return {name.lower(): method for name, method in REGISTERED.items()}


def adapter_config(method: str) -> Any:
    """The config of a registered bottleneck method's adapter that is measured."""
    return _CONFIGS.get(method) or registered_methods()[method].example


def ranks(method: str) -> tuple[int, int]:
    """Rank and number of experts (1 where there are none) of a bottleneck method's adapter that is measured."""
    if method == "lora":
        return 16, 1
    config = adapter_config(method)
    return config.r, getattr(config, "num_experts", 1)


@dataclass(frozen=True)
class LayerCase:
    """The shape of a layer benchmark; what its adapter is like, the subclasses say."""

    method: str  # one of METHODS
    tokens: int
    in_features: int
    out_features: int
    dtype: torch.dtype  # of x, of the base weight and of the output
    adapter_dtype: torch.dtype

    @property
    def name(self) -> str:
        """The method, its adapter's size, the layer's shape and the dtype."""
        shape = f"T={self.tokens} {self.in_features}x{self.out_features}"
        return f"{self.method} {self.adapter} {shape} {str(self.dtype).removeprefix('torch.')}"

    @property
    def adapter(self) -> str:
        """Its size, short: for the name."""
        raise NotImplementedError


@dataclass(frozen=True)
class BottleneckCase(LayerCase):
    """A layer with an adapter that adds to its output."""

    rank: int
    num_experts: int  # 1 where there are none

    @property
    def adapter(self) -> str:
        """Its size, short: for the name."""
        if self.method == "lora":
            return f"r={self.rank}"
        described = registered_methods()[self.method].describe(adapter_config(self.method))
        return described.replace(",", "")


@dataclass(frozen=True)
class RowCase(LayerCase):
    """A layer of whose rows some are trained: LoKI."""

    quota: int  # percent

    @property
    def adapter(self) -> str:
        """Its size, short: for the name."""
        return f"{self.quota}%"

    @property
    def rows(self) -> int:
        """k: how many are trained."""
        return trained_rows(self.out_features, self.quota)


def trained_rows(out_features: int, quota: int = QUOTA) -> int:
    """`quota` percent of the rows, rounded down as gci_kernels.loki.select does; at least one."""
    return max(1, out_features * quota // 100)


def layer_shape(method: str, tokens: int, in_features: int, out_features: int) -> Shape:
    """The sizes of a layer whose adapter is of the size that is measured everywhere."""
    if method == "loki":
        return Shape(tokens, in_features, out_features, 0, 0, 0, trained_rows(out_features))
    rank, number = ranks(method)
    experts = number if number > 1 else 0
    return Shape(tokens, in_features, out_features, rank * number, experts, experts)


def make_case(
    method: str, tokens: int, in_features: int, out_features: int, dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
) -> LayerCase:  # fmt: skip
    """The case of a method, its adapter of the size that is measured everywhere, in `dtype` if not said otherwise."""
    shape = (method, tokens, in_features, out_features, dtype, adapter_dtype or dtype)
    return RowCase(*shape, QUOTA) if method == "loki" else BottleneckCase(*shape, *ranks(method))


def layer_case(
    method: str, dtype: torch.dtype, adapter_dtype: torch.dtype | None = None, *, shrink: int = 1
) -> LayerCase:
    """T=2048 over 2048x2048, for LoKI over a down_proj, 5504x2048; each of the three divided by `shrink`."""
    sizes = (2048, 5504 if method == "loki" else 2048, 2048)
    return make_case(method, *(size // shrink for size in sizes), dtype, adapter_dtype)


CASES = [layer_case(method, dtype) for method in METHODS for dtype in (torch.float32, torch.bfloat16)]


def floor_of(case: LayerCase, device: torch.device) -> dict[str, float] | None:
    """The least time of "frozen" and "gci" on `device`; None where it is not known, as of a chip without rates."""
    if case.method not in ("lora", "loramoe", "loki"):
        return None
    shape = layer_shape(case.method, case.tokens, case.in_features, case.out_features)
    return costs.floor_seconds(shape, case.dtype, case.adapter_dtype, device)


@dataclass(frozen=True)
class LayerInputs:
    """The tensors that every case has."""

    x: Tensor  # [T, in], dtype
    weight: Tensor  # [out, in], dtype
    dy: Tensor  # [T, out], dtype


@dataclass(frozen=True)
class BottleneckInputs(LayerInputs):
    """With the adapter's, stacked as gci_kernels takes them."""

    A: Tensor  # [rank, in], adapter_dtype
    B: Tensor  # [out, columns], adapter_dtype
    weights: dict[str, Tensor]  # the mixer's, adapter_dtype, by its name: LoRAMoE's router, ALoRA's qkv
    scaling: float
    method: str


@dataclass(frozen=True)
class RowInputs(LayerInputs):
    """With the trained rows, which are far from the base layer's own."""

    active: Tensor  # [k, in], adapter_dtype
    positions: Tensor  # [k] int64, ascending


def make_inputs(case: LayerCase, device: torch.device, seed: int = 0) -> LayerInputs:
    """Random tensors of the sizes that a trained layer has; B isn't zero, so no gradient is trivially zero."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int, std: float, dtype: torch.dtype = case.adapter_dtype) -> Tensor:
        return (torch.randn(rows, columns, generator=generator, device=device) * std).to(dtype)

    fan_in = 1 / math.sqrt(case.in_features)
    base = dict(
        x=normal(case.tokens, case.in_features, 1.0, case.dtype),
        weight=normal(case.out_features, case.in_features, fan_in, case.dtype),
        dy=normal(case.tokens, case.out_features, 1.0, case.dtype),
    )
    if isinstance(case, RowCase):
        positions = random_rows(case.out_features, case.rows, generator)
        return RowInputs(**base, active=normal(case.rows, case.in_features, fan_in), positions=positions)
    if case.method == "lora":
        shapes = {"A": (case.rank, case.in_features), "B": (case.out_features, case.rank)}
    else:
        method = registered_methods()[case.method]
        made = method.parameters(adapter_config(case.method), case.in_features, case.out_features)
        shapes = {part: tuple(tensor.shape) for part, tensor in made.items()}
    drawn = {part: normal(*shape, 0.02 if part == "B" else shape[1] ** -0.5) for part, shape in shapes.items()}
    A, B = drawn.pop("A"), drawn.pop("B")
    return BottleneckInputs(**base, A=A, B=B, weights=drawn, scaling=LORA_ALPHA / case.rank, method=case.method)


def random_rows(out_features: int, rows: int, generator: torch.Generator) -> Tensor:
    """[rows] int64, distinct and ascending, on the generator's device."""
    return torch.randperm(out_features, generator=generator, device=generator.device)[:rows].sort().values


def change(parameters: Iterable[Tensor]) -> None:
    """What an optimizer does between two steps: other numbers in the same memory. Twice gives the first ones back.

    It comes before every timed step and is no part of its time. What a variant keeps of its weights from step to step,
    as LoKI's copy with the trained rows, is out of date then: to renew it is part of the step.
    """
    with torch.no_grad():
        for parameter in parameters:
            parameter.neg_()


def change_adapters(model: nn.Module) -> None:
    """:func:`change` of everything that a model trains."""
    change(parameter for parameter in model.parameters() if parameter.requires_grad)


@dataclass(frozen=True)
class LayerVariant:
    """One way to compute a case: its forward, and the leaves that need a gradient, by role."""

    forward: Callable[[], Tensor]
    leaves: dict[str, list[Tensor]]
    dy: Tensor

    def change(self) -> None:
        """:func:`change` of the adapter's weights."""
        change(leaf for role, leaves in self.leaves.items() if role != "x" for leaf in leaves)

    def step(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Forward, and backward to every leaf: the thing that is timed."""
        y = self.forward()
        return y, torch.autograd.grad(y, [leaf for leaves in self.leaves.values() for leaf in leaves], self.dy)

    def results(self) -> dict[str, Tensor]:
        """y and the gradient of every role, experts stacked: the things that are compared.

        A step with other weights goes before, as in training: what is still of those is wrong now.
        """
        self.change()
        self.step()
        self.change()
        y, grads = self.step()
        remaining = iter(grads)
        stacked = {f"d{role}": stack(role, [next(remaining) for _ in leaves]) for role, leaves in self.leaves.items()}
        return {"y": y.detach(), **stacked}


def layer_variants(inputs: LayerInputs) -> dict[str, LayerVariant]:
    """The columns of the table: "frozen" (the base layer with its dX), "eager" and "gci"."""
    return {"frozen": frozen_variant(inputs), "eager": eager_variant(inputs), "gci": gci_variant(inputs)}


def frozen_variant(inputs: LayerInputs) -> LayerVariant:
    """The base layer with its dX."""
    x = inputs.x.clone().requires_grad_()
    return LayerVariant(lambda: nn.functional.linear(x, inputs.weight), {"x": [x]}, inputs.dy)


def eager_variant(inputs: LayerInputs) -> LayerVariant:
    """The adapted layer as the published code, PEFT or the formula computes it."""
    x, layer = inputs.x.clone().requires_grad_(), _eager_layer(inputs)
    return LayerVariant(lambda: layer(x), {"x": [x], **adapter_leaves(layer)}, inputs.dy)


def _eager_layer(inputs: LayerInputs) -> nn.Module:
    if isinstance(inputs, RowInputs):
        return EagerLoKILinear(inputs.weight, None, inputs.active, inputs.positions)
    base = nn.Linear(inputs.weight.shape[1], inputs.weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(inputs.weight, requires_grad=False)
    config = None if inputs.method == "lora" else adapter_config(inputs.method)
    return eager_layer(inputs.method, base, inputs.A, inputs.B, inputs.weights, inputs.scaling, config)


def gci_variant(inputs: LayerInputs, impl: str = "auto") -> LayerVariant:
    """The adapted layer in gci_kernels."""
    make = _gci_rows if isinstance(inputs, RowInputs) else _gci_bottleneck
    return make(inputs, inputs.x.clone().requires_grad_(), impl)


def _gci_rows(inputs: RowInputs, x: Tensor, impl: str) -> LayerVariant:
    """One kept copy serves all steps, as a model's layer has it; each step finds its trained rows changed."""
    active, merged = inputs.active.clone().requires_grad_(), ops.MergedRows()
    return LayerVariant(
        lambda: ops.loki_linear(x, inputs.weight, None, active, inputs.positions, merged=merged, impl=impl),
        {"x": [x], "active": [active]},
        inputs.dy,
    )


def _gci_bottleneck(inputs: BottleneckInputs, x: Tensor, impl: str) -> LayerVariant:
    A, B, *weights = (tensor.clone().requires_grad_() for tensor in (inputs.A, inputs.B, *inputs.weights.values()))
    base, options = (x, inputs.weight, None), dict(scaling=inputs.scaling, impl=impl)
    leaves = {"x": [x], "A": [A], "B": [B], **{name: [t] for name, t in zip(inputs.weights, weights, strict=True)}}
    if inputs.method == "lora":
        return LayerVariant(lambda: ops.lora_linear(*base, A, B, **options), leaves, inputs.dy)
    if inputs.method == "loramoe":
        return LayerVariant(lambda: ops.loramoe_linear(*base, A, B, *weights, **options)[0], leaves, inputs.dy)
    method = registered_methods()[inputs.method]
    options |= dict(mixer=method.mixer, settings=method.settings(adapter_config(inputs.method)))
    return LayerVariant(lambda: ops.bottleneck_linear(*base, A, B, *weights, **options)[0], leaves, inputs.dy)
