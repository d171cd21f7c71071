"""LoRAMoE's gate, the mixer between `project` and `expand`.

`projected` [tokens, num_experts*r + num_experts] holds x @ A.T and, behind it, the router's logits. Each implementation
is a module with

    forward(projected, num_experts, top_k, scaling, dtype) -> u, gates
    backward(du, dgates, projected, num_experts, top_k, scaling, dtype) -> dprojected, u

u [tokens, num_experts*r] and dprojected in `dtype`; du in projected's, which is `dtype` or float32 where that is
bfloat16; gates and dgates [tokens, num_experts] float32, or float64 where dtype is float64. Equal logits at the edge of
top_k: the lower expert is kept.
"""

from gci_kernels.ops.gate import kernels as kernels
