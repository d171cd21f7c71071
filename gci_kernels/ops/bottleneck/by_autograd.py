"""Forward and backward of a mixer that has its formula alone: autograd differentiates it, over tokens x rank values."""

import math
from typing import Any

import torch
from torch import Tensor

from gci_kernels.ops.bottleneck.mixer import Call, Kept, Mixer, Output, Shape

_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality


class ByAutograd:
    """The :class:`~gci_kernels.ops.bottleneck.mixer.Stages` of a mixer's formula.

    It keeps `projected`, and computes the formula again in backward. What the formula returns is checked against what
    the mixer declares.
    """

    def __init__(self, mixer: Mixer) -> None:
        self.mixer = mixer

    def forward(self, projected: Tensor, weights: Tensor | None, call: Call) -> tuple[Tensor, Kept, Tensor]:
        """See :class:`~gci_kernels.ops.bottleneck.mixer.Stages`."""
        u, output = self._run(projected, weights, call)
        return self._scaled(u, call), Kept(projected, u.new_empty(0), u.new_empty(0)), output

    def recompute(self, weights: Tensor | None, kept: Kept, call: Call) -> Tensor:
        """See :class:`~gci_kernels.ops.bottleneck.mixer.Stages`."""
        return self._scaled(self._run(kept.projected, weights, call)[0], call)

    def backward(
        self, du: Tensor, doutput: Tensor | None, weights: Any, kept: Kept, call: Call
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """See :class:`~gci_kernels.ops.bottleneck.mixer.Stages`."""
        own = weights is not None and not self.mixer.joins
        # Within an operator autograd is left out of the dispatch: it is taken in again for the formula.
        with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(_AUTOGRAD, False):
            leaves = [t.detach().requires_grad_() for t in (kept.projected, *((weights,) if own else ()))]
            u, output = self._run(leaves[0], leaves[1] if own else weights, call)
            outputs, gradients = [u], [(du * call.scaling).to(u.dtype).view(u.shape)]
            if doutput is not None and output.requires_grad:
                outputs, gradients = [u, output], [*gradients, doutput.to(output.dtype).view(output.shape)]
            dprojected, *dweights = torch.autograd.grad(outputs, leaves, gradients, materialize_grads=True)
        return dprojected.to(call.dtype), dweights[0] if own else None, self._scaled(u.detach(), call)

    def shapes(self, weights: Tensor | None, call: Call) -> list[Shape]:
        """See :class:`~gci_kernels.ops.bottleneck.mixer.Stages`; the formula is asked, on tensors without storage."""
        tokens, rows = math.prod(call.lead), 0 if weights is None else weights.shape[0]
        width = call.rank + (rows if self.mixer.joins else 0)
        device = "meta" if weights is None else weights.device
        nothing = (0,), call.dtype
        output: Shape = nothing
        if self.mixer.output is not Output.NONE:
            made = self._run(torch.empty(tokens, width, dtype=call.sum_dtype, device=device), weights, call)[1]
            output = tuple(made.shape), made.dtype
        return [((tokens, width), call.sum_dtype), nothing, nothing, output]

    def _run(self, projected: Tensor, weights: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """u [*lead, columns of B], unscaled, and the output."""
        wide = projected.view(*call.lead, projected.shape[-1])
        seen = None if weights is None else weights.to(wide.dtype)
        if self.mixer.joins:
            wide, seen = wide[..., : call.rank], wide[..., call.rank :]
        return apply(self.mixer, wide, seen, call, 0 if weights is None else weights.shape[0])

    def _scaled(self, u: Tensor, call: Call) -> Tensor:
        return (u * call.scaling).to(call.dtype).view(math.prod(call.lead), u.shape[-1])


def apply(mixer: Mixer, h: Tensor, weights: Tensor | None, call: Call, rows: int) -> tuple[Tensor, Tensor]:
    """The formula's u and output (an empty tensor where there is none).

    Raises:
        ValueError: they are not what the mixer declares.
    """
    made = mixer.formula(h, weights, call)
    if isinstance(made, tuple) and len(made) != 2:
        raise ValueError(f"mixer {mixer.name!r}: its formula returned {len(made)} values, not u, or u and an output")
    u, output = made if isinstance(made, tuple) else (made, None)
    declared = mixer.columns(call.rank, rows)
    if not isinstance(u, Tensor) or tuple(u.shape) != (*h.shape[:-1], declared):
        got = list(u.shape) if isinstance(u, Tensor) else type(u).__name__
        raise ValueError(
            f"mixer {mixer.name!r}: its formula returned u {got} for h {list(h.shape)}, where its `columns` declares "
            f"{[*h.shape[:-1], declared]}; make the two agree"
        )
    if (output is not None) != (mixer.output is not Output.NONE):
        raise ValueError(
            f"mixer {mixer.name!r} declares output=Output.{mixer.output.name}, and its formula returned "
            f"{'no output' if output is None else 'an output'}; make the two agree"
        )
    return u, u.new_empty(0) if output is None else output
