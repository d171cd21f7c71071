"""Random operands of LoRA and LoRAMoE, and the formulas once more."""

import torch

FUSED = ("aten", "native")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def make(tokens=(130,), in_features=67, out_features=45, r=4, experts=8, dtype=torch.float64, bias=True, seed=0):
    """Arguments of loramoe_linear (experts > 0) or lora_linear (experts = 0); no term drowns another."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    width = r * max(experts, 1)
    arguments = {
        "x": draw(*tokens, in_features),
        "weight": draw(out_features, in_features, scale=in_features**-0.5),
        "bias": draw(out_features) if bias else None,
        "A": draw(width, in_features, scale=in_features**-0.5),
        "B": draw(out_features, width, scale=width**-0.5),
    }
    if experts:
        arguments["router"] = draw(experts, in_features, scale=in_features**-0.5)
    return arguments


def restated(x, weight, bias, A, B, router, scaling, top_k=None):
    """Section 3 of the design, one expert at a time."""
    gates = torch.softmax(x @ router.T, dim=-1)
    experts, r = router.shape[0], A.shape[0] // router.shape[0]
    if top_k is not None:
        kept = torch.zeros_like(gates)
        for token, row in zip(kept.view(-1, experts), gates.reshape(-1, experts), strict=True):
            best = sorted(range(experts), key=lambda n: (-row[n].item(), n))[:top_k]
            token[best] = 1
        gates = gates * kept / (gates * kept).sum(-1, keepdim=True)
    y = x @ weight.T + (0 if bias is None else bias)
    for n in range(experts):
        rows = slice(n * r, (n + 1) * r)
        y = y + scaling * gates[..., n, None] * (x @ A[rows].T @ B[:, rows].T)
    return y, gates


def gradients(function, arguments, **options):
    """Outputs of `function` and the gradient of every tensor argument, for a fixed random dout."""
    leaves = {k: None if v is None else v.detach().clone().requires_grad_() for k, v in arguments.items()}
    torch.manual_seed(7)
    outputs = function(**leaves, scaling=2.0, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(1)
    torch.autograd.backward(outputs, [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o) for o in outputs])
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return results | {"d" + k: leaf.grad for k, leaf in leaves.items() if leaf is not None}
