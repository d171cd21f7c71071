"""Eager PyTorch to compare with: the published LoRAMoE layer's computation; for LoRA, the layer that PEFT has."""

import copy
import itertools

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from gci_kernels.tuners.loramoe import LoRAMoELinear

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
    ):
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


def adapter_leaves(layer: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The adapter parameters of a layer by role: A, B and, in LoRAMoE, router; empty where it is no adapted layer.

    A role has one parameter in a layer that stacks its experts and one for each expert in the eager one; `stack` makes
    both the same tensor.
    """
    if isinstance(layer, LoRAMoELinear):
        stacked = {"A": layer.loramoe_A, "B": layer.loramoe_B, "router": layer.loramoe_router}
        return {role: [parameters[ADAPTER]] for role, parameters in stacked.items()}
    if isinstance(layer, EagerLoRAMoELinear):
        experts = {"A": layer.experts_A, "B": layer.experts_B, "router": [layer.router]}
    elif isinstance(layer, LoraLayer):
        experts = {"A": [layer.lora_A[ADAPTER]], "B": [layer.lora_B[ADAPTER]]}
    else:
        return {}
    return {role: [linear.weight for linear in linears] for role, linears in experts.items()}


def stack(role: str, tensors: list[Tensor]) -> Tensor:
    """Per-expert tensors of one role as the stacked one: A [N*r, in], B [out, N*r], router [N, in]."""
    return torch.cat(tensors, dim=1 if role == "B" else 0)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters and buffers, so that variants of a model cost no weights."""
    memo = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def to_eager(model: nn.Module) -> nn.Module:
    """A copy of a patched model whose LoRAMoE layers are eager ones with the same values; the base is shared.

    The copy is the plain model, without the PeftModel around it: the baseline pays for no wrapper.
    """
    model = shared_copy(model.get_base_model() if hasattr(model, "get_base_model") else model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRAMoELinear)}
    for name, layer in layers.items():
        tensors = {role: parameters[0] for role, parameters in adapter_leaves(layer).items()}
        eager = EagerLoRAMoELinear(layer.base_layer, **tensors, scaling=layer.scaling[ADAPTER])
        model.set_submodule(name, eager)
    return model


def collect_grads(model: nn.Module) -> dict[str, Tensor]:
    """Every adapter gradient of a model under one name for all variants, experts stacked: "layers.0...up_proj.A"."""
    grads = {}
    for name, layer in model.named_modules():
        for role, parameters in adapter_leaves(layer).items():
            grads[f"{name.removeprefix('base_model.model.')}.{role}"] = stack(role, [p.grad for p in parameters])
    return grads
