"""Eager PyTorch to compare with: the published layers of LoRAMoE and LoKI, PEFT's LoRA, ALoRA's formulas."""

import copy
import itertools
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gci_kernels import METHODS, Method
from gci_kernels.generation import sequence
from gci_kernels.ops import bottleneck_linear
from gci_kernels.tuners import LoKILinear
from gci_kernels.tuners.bottleneck import BottleneckLayer

ADAPTER = "default"


class EagerLoRAMoELinear(nn.Module):
    """A linear layer with LoRAMoE experts, computed the way the published layer computes it (arXiv 2312.09979).

    Each expert is two linear layers of its own and is added to the result in turn, weighted by its gate: for every
    expert, a few [..., out] temporaries, most of them kept for backward. Gates are a float32 softmax (float64 for
    float64 adapters) rounded to the result's dtype. Every expert draws its own dropout mask.

    Args:
        base_layer: the frozen linear layer, in -> out.
        A: [N*r, in], the experts' down-projections, stacked expert-major. Copied.
        B: [out, N*r], their up-projections, in the same order. Copied.
        router: [N, in]. Copied.
        scaling: multiplies the experts' sum; lora_alpha / r.
    """

    def __init__(
        self, base_layer: nn.Linear, A: Tensor, B: Tensor, router: Tensor, *, scaling: float, dropout_p: float = 0.0
    ) -> None:
        super().__init__()
        num_experts = router.shape[0]
        self.base_layer = base_layer
        self.experts_A = nn.ModuleList(_linear(rows) for rows in A.chunk(num_experts, dim=0))
        self.experts_B = nn.ModuleList(_linear(columns) for columns in B.chunk(num_experts, dim=1))
        self.router = _linear(router)
        self.dropout = nn.Dropout(dropout_p) if dropout_p > 0 else nn.Identity()
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] in the base layer's dtype -> [..., out] in the same dtype."""
        result = self.base_layer(x)
        dtype = result.dtype
        x = x.to(self.router.weight.dtype)
        logits = self.router(x)
        gates = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(dtype)
        for gate, expert_A, expert_B in zip(gates.unbind(-1), self.experts_A, self.experts_B, strict=True):
            result = result + gate.unsqueeze(-1) * expert_B(expert_A(self.dropout(x))) * self.scaling
        return result.to(dtype)


class EagerALoRALinear(nn.Module):
    """A linear layer with ALoRA in the operations that its definition names: all scores of all heads, softmax, product.

    Args:
        base_layer: the frozen linear layer, in -> out.
        A: [r, in], qkv [3r, r], B [out, r]. Copied.
        num_heads: of the attention.
        scaling: multiplies the update; lora_alpha / r.
        key: the layer's name in the adapter's cache, of a model that gci_kernels.generation.sequence is attached to.
    """

    def __init__(
        self, base_layer: nn.Linear, A: Tensor, B: Tensor, qkv: Tensor, *, num_heads: int, scaling: float, key: str = ""
    ) -> None:
        super().__init__()
        self.base_layer, self.num_heads, self.scaling, self.key = base_layer, num_heads, scaling, key
        self.A, self.qkv, self.B = _linear(A), _linear(qkv), _linear(B)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, time, in] or [time, in] in the base layer's dtype -> [..., out] in the same dtype."""
        result, context = self.base_layer(x), sequence.current()
        made = self.qkv(self.A(x.to(self.A.weight.dtype)))
        q, kv = (made if made.dim() == 3 else made.unsqueeze(0)).tensor_split([self.A.weight.shape[0]], -1)
        segments = None
        if context is not None:
            past = context.past(self.key, ADAPTER, kv)
            context.keep(self.key, ADAPTER, kv.detach())
            kv, segments = kv if past is None else torch.cat((past, kv), 1), context.sequence.segments
        k, v = kv.chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).tril(k.shape[2] - q.shape[2])
        if segments is not None:
            own = segments[:, None, k.shape[2] - q.shape[2] :, None]
            visible = visible & (own == segments[:, None, None]) & (own >= 0)
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        o = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype) @ v
        if segments is not None:
            o = o * (own >= 0)
        return (result + self.B(o.transpose(1, 2).flatten(2)).view_as(result) * self.scaling).to(result.dtype)


class EagerLoKILinear(nn.Module):
    """A linear layer of whose rows some are trained, computed the way the published layer computes it (2505.22120).

    Trained and frozen rows are two linear layers. Their outputs are concatenated, so are their biases, which are added,
    and `gather` brings the columns into their order by an index of the output's size: three [..., out] temporaries
    beside the result, and in backward as many.

    Args:
        weight: [out, in]. Its frozen rows are copied.
        bias: [out] or None. Copied in the same way.
        active: [k, in], the trained rows, in the weight's dtype or a wider one; converted to x's dtype. Copied.
        positions: [k] int64, their distinct indices in the weight.
        active_bias: [k]; None where there is no bias. Copied.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, active: Tensor, positions: Tensor, active_bias: Tensor | None = None
    ) -> None:
        super().__init__()
        rest = torch.ones(weight.shape[0], dtype=torch.bool, device=weight.device)
        rest = rest.index_fill(0, positions, False).nonzero().squeeze(1)
        self.active, self.frozen = _linear(active), _linear(weight[rest]).requires_grad_(False)
        self.active_bias = self.frozen_bias = None
        if bias is not None:
            self.active_bias = nn.Parameter(active_bias.detach().clone())
            self.frozen_bias = nn.Parameter(bias.detach()[rest], requires_grad=False)
        # Output column -> column of the concatenation.
        self.register_buffer("index_map", torch.cat((positions, rest)).argsort())

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] in the weight's dtype -> [..., out] in the same dtype."""
        trained = nn.functional.linear(x, self.active.weight.to(x.dtype))
        result = torch.cat((trained, self.frozen(x)), dim=-1)
        if self.active_bias is not None:
            result = result + torch.cat((self.active_bias.to(x.dtype), self.frozen_bias))
        return result.gather(-1, self.index_map.expand(result.shape))


def _linear(weight: Tensor) -> nn.Linear:
    """A trainable linear layer without bias that holds a copy of `weight` [out, in]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    return layer


def peft_lora_linear(base_layer: nn.Linear, A: Tensor, B: Tensor, *, scaling: float) -> nn.Module:
    """PEFT's own LoRA layer around `base_layer`, with copies of A [r, in] and B [out, r]; rank-independent scaling."""
    rank = A.shape[0]
    config = LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=["proj"])
    layer = inject_adapter_in_model(config, nn.ModuleDict({"proj": base_layer}))["proj"]
    layer.lora_A[ADAPTER] = _linear(A)
    layer.lora_B[ADAPTER] = _linear(B)
    return layer


class EagerBottleneckLinear(nn.Module):
    """A linear layer with an adapter of any registered method, in the operations of its mixer's formula.

    Args:
        base_layer: the frozen linear layer, in -> out.
        A, B: the adapter's; weights: the mixer's, by their name. Copied.
        scaling: multiplies the update.
        method, config: the method, and the adapter's config.
    """

    def __init__(
        self, base_layer: nn.Linear, A: Tensor, B: Tensor, weights: dict[str, Tensor], scaling: float, method: Method,
        config: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.base_layer, self.scaling, self.method, self.config = base_layer, scaling, method, config
        self.A, self.B = _linear(A), _linear(B)
        self.weights = nn.ModuleDict({name: _linear(tensor) for name, tensor in weights.items()})

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] in the base layer's dtype -> [..., out] in the same dtype."""
        return bottleneck_linear(
            x, self.base_layer.weight, self.base_layer.bias, self.A.weight, self.B.weight,
            *(linear.weight for linear in self.weights.values()), mixer=self.method.mixer, scaling=self.scaling,
            settings=self.method.settings(self.config), impl="reference",
        )[0]  # fmt: skip


def eager_layer(
    method: str, base: nn.Linear, A: Tensor, B: Tensor, weights: dict[str, Tensor], scaling: float, config: Any,
    key: str = "",
) -> nn.Module:  # fmt: skip
    """A bottleneck adapter's eager layer: the published code's, PEFT's or, of a method without one, its formula's.

    Args:
        weights: the mixer's, by their name.
        config: of a registered method; None for LoRA.
        key: the layer's name in the model.
    """
    if method == "lora":
        return peft_lora_linear(base, A, B, scaling=scaling)
    if method == "loramoe":
        return EagerLoRAMoELinear(base, A, B, **weights, scaling=scaling)
    if method == "alora":
        return EagerALoRALinear(base, A, B, **weights, num_heads=config.num_heads, scaling=scaling, key=key)
    record = next(each for name, each in METHODS.items() if name.lower() == method)
    return EagerBottleneckLinear(base, A, B, weights, scaling, record, config)


def adapter_leaves(layer: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The adapter parameters of a layer by role; empty where it is no adapted layer.

    The roles are A, B and what the mixer's weights are called; of LoKI active and, where the base layer has a bias,
    active_bias.

    A role has one parameter in a layer that stacks its experts and one for each expert in the eager one; `stack` makes
    both the same tensor.
    """
    if isinstance(layer, BottleneckLayer):
        return {role: [tensor] for role, tensor in zip(layer.roles, layer.tensors(ADAPTER), strict=False)}
    if isinstance(layer, LoKILinear):
        made = {"active": layer.loki_active, "active_bias": layer.loki_active_bias}
        return {role: [parameters[ADAPTER]] for role, parameters in made.items() if ADAPTER in parameters}
    if isinstance(layer, EagerLoKILinear):
        rows = {"active": layer.active.weight, "active_bias": layer.active_bias}
        return {role: [parameter] for role, parameter in rows.items() if parameter is not None}
    if isinstance(layer, EagerBottleneckLinear):
        linears = {"A": [layer.A], "B": [layer.B], **{name: [linear] for name, linear in layer.weights.items()}}
    elif isinstance(layer, EagerALoRALinear):
        linears = {"A": [layer.A], "B": [layer.B], "qkv": [layer.qkv]}
    elif isinstance(layer, EagerLoRAMoELinear):
        linears = {"A": layer.experts_A, "B": layer.experts_B, "router": [layer.router]}
    elif isinstance(layer, LoraLayer):
        linears = {"A": [layer.lora_A[ADAPTER]], "B": [layer.lora_B[ADAPTER]]}
    else:
        return {}
    return {role: [linear.weight for linear in each] for role, each in linears.items()}


def stack(role: str, tensors: list[Tensor]) -> Tensor:
    """Concatenates the experts' tensors of one role: A to [N*r, in], B to [out, N*r]. Other roles have one tensor."""
    return torch.cat(tensors, dim=1 if role == "B" else 0)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares all parameters and buffers with `model`: it takes no memory for weights."""
    memo = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def to_eager(model: nn.Module) -> nn.Module:
    """A copy of a patched model in which eager layers with the same values replace the package's own layers.

    All base weights but LoKI's frozen rows are shared. The copy is the plain model, without the PeftModel around it, so
    that the baseline has no cost of a wrapper.
    """
    model = shared_copy(model.get_base_model() if hasattr(model, "get_base_model") else model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, (BottleneckLayer, LoKILinear)):
            model.set_submodule(name, _eager_copy(layer, name))
    return model


def _eager_copy(layer: BottleneckLayer | LoKILinear, name: str) -> nn.Module:
    tensors = {role: parameters[0] for role, parameters in adapter_leaves(layer).items()}
    base = layer.base_layer
    if isinstance(layer, LoKILinear):
        weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
        return EagerLoKILinear(weight, base.bias, positions=layer.loki_positions[ADAPTER], **tensors)
    A, B, config = tensors.pop("A"), tensors.pop("B"), layer.configs[ADAPTER]
    return eager_layer(layer.method.name.lower(), base, A, B, tensors, layer.scaling[ADAPTER], config, name)


def collect_grads(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of all adapter parameters, experts stacked, by names that all variants share: "...up_proj.A"."""
    grads = {}
    for name, layer in model.named_modules():
        for role, parameters in adapter_leaves(layer).items():
            grads[f"{name.removeprefix('base_model.model.')}.{role}"] = stack(role, [p.grad for p in parameters])
    return grads
