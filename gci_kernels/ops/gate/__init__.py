"""LoRAMoE's gate, the mixer between `project` and `expand`.

`projected` [tokens, num_experts*r + num_experts] holds x @ A.T and, behind it, the router's logits. aten.py, native.py
(C++) and triton.py each have

    forward(projected, num_experts, top_k, scaling, dtype) -> u, gates
    backward(du, dgates, projected, num_experts, top_k, scaling, dtype) -> dprojected, u

where `dtype` is x's, and `projected` is in `dtype` or in float32 where that is narrower. reference.py is the formula.
Of equal logits at the edge of the top_k, the lower expert is kept.
"""

from gci_kernels.ops.gate import kernels as kernels
