"""LoRAMoE's gate, the mixer between `project` and `expand`.

`projected` [tokens, num_experts*r + num_experts] holds x @ A.T and, behind it, the router's logits. Each implementation
is a module with

    forward(projected, num_experts, top_k, scaling, dtype) -> u, gates
    backward(du, dgates, projected, num_experts, top_k, scaling) -> dprojected, u

u and du [tokens, num_experts*r] in `dtype`; gates and dgates [tokens, num_experts] float32, or float64 where dtype is
float64; dprojected in du's dtype. Equal logits at the edge of top_k: the lower expert is kept.
"""
