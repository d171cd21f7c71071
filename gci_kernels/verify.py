"""`gci-kernels verify`: every implementation that can run here against the float64 reference, forward and gradients."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from gci_kernels import ops
from gci_kernels.impl import native_obstacle, triton_obstacle
from gci_kernels.testing import Check, error_bound, relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# tokens, in, out, r, experts (0: LoRA), top_k, dropout: odd sizes, one token, one expert, larger than a tile
CASES = (
    (130, 67, 45, 16, 0, None, 0.0),
    (1, 64, 48, 4, 8, None, 0.0),
    (130, 67, 45, 4, 8, None, 0.0),
    (37, 33, 130, 3, 5, 2, 0.0),
    (257, 1100, 96, 16, 1, None, 0.0),
    (64, 96, 80, 4, 6, None, 0.25),
)


def make_inputs(case: tuple, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    tokens, in_features, out_features, r, experts, _, _ = case
    generator = torch.Generator().manual_seed(0)
    width = r * max(experts, 1)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    tensors = {
        "x": draw(tokens, in_features),
        "weight": draw(out_features, in_features, scale=in_features**-0.5),
        "bias": draw(out_features),
        "A": draw(width, in_features, scale=in_features**-0.5),
        "B": draw(out_features, width, scale=width**-0.5),
    }
    if experts:
        tensors["router"] = draw(experts, in_features, scale=in_features**-0.5)
    return tensors


def run_case(case: tuple, tensors: dict[str, Tensor], impl: str) -> dict[str, Tensor]:
    """y, the gates and every gradient of one case, for a fixed random dout and a fixed dropout seed."""
    *_, experts, top_k, dropout_p = case
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    torch.manual_seed(1)
    if experts:
        y, gates = ops.loramoe_linear(**leaves, scaling=2.0, top_k=top_k, dropout_p=dropout_p, impl=impl)
        outputs = {"y": y, "gates": gates}
    else:
        outputs = {"y": ops.lora_linear(**leaves, scaling=2.0, dropout_p=dropout_p, impl=impl)}
    generator = torch.Generator().manual_seed(2)
    douts = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs.values()]
    torch.autograd.backward(list(outputs.values()), douts)
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return {name: t.detach() for name, t in (outputs | gradients).items()}


def obstacle(impl: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `impl` cannot run there, or None where it can."""
    asked = {"native": native_obstacle, "triton": triton_obstacle}.get(impl)
    return None if asked is None else asked(torch.device(device).type, dtype)


def check_case(case: tuple, dtype: torch.dtype, impl: str, device: str) -> list[Check]:
    """y, the gates and every gradient of one case.

    Truth is the reference in float64 on the same rounded inputs; the bound is twice the error that the reference itself
    makes at the working dtype, plus that dtype's rounding.
    """
    tensors = make_inputs(case, dtype, device)
    truth = run_case(case, {name: t.double() for name, t in tensors.items()}, "reference")
    plain, actual = run_case(case, tensors, "reference"), run_case(case, tensors, impl)
    tokens, in_features, out_features, r, experts, top_k, dropout_p = case
    method = f"loramoe {experts}x{r}" if experts else f"lora r={r}"
    label = f"{method} T={tokens} {in_features}->{out_features} top_k={top_k} p={dropout_p}"
    return [
        Check(
            label, impl, str(dtype).removeprefix("torch."), name,
            relative_error(actual[name], truth[name]),
            error_bound(relative_error(plain[name], truth[name]), dtype),
        )
        for name in truth
    ]  # fmt: skip


def verify(device: str = "cpu") -> Iterator[list[Check]]:
    """One list of checks for each case, dtype and implementation that can run on `device`."""
    for case, dtype, impl in itertools.product(CASES, DTYPES, ("aten", "native", "triton")):
        if obstacle(impl, device, dtype) is None:
            yield check_case(case, dtype, impl, device)
