"""LoKI's attribution to compare with: the published procedure, a whole pass for each layer (arXiv 2505.22120)."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gci_kernels.loki.architecture import Architecture


def published_attribution(
    model: nn.Module, input_ids: Tensor, *, path: str = "last_position", steps: int = 7, target: Tensor | None = None
) -> Tensor:
    """Scores of one sample, computed the way the published code computes them, both paths batched over their steps.

    For every layer, the prompt is repeated `steps` times, the layer's projection has its output moved, and the target's
    probability is differentiated for what was put in its place. What the published code does beside that is left out:
    it keeps no keys and values, and it takes each layer's outputs from one pass, not from one for each layer.

    Args:
        model: a causal language model; no parameter of it may ask for a gradient.
        input_ids: [1, tokens] int64.
        target: [1] int64; default: the most probable next token.

    Returns:
        [layers, out] in the model's dtype.
    """
    projections = Architecture.of(model).projections
    outputs, logits = _outputs(model, projections, input_ids)
    target = int(logits.argmax()) if target is None else int(target)
    move = _last_position if path == "last_position" else _all_positions
    baselines = None if path == "last_position" else _outputs(model, projections, torch.zeros_like(input_ids))[0]
    scores = []
    for layer, (projection, output) in enumerate(zip(projections, outputs, strict=True)):
        points, weights, difference = move(output, None if baselines is None else baselines[layer], steps)
        with _replaced(projection, points.requires_grad_()):
            logits = model(input_ids=input_ids.expand(steps, -1), use_cache=False, logits_to_keep=1).logits[:, -1]
        (gradients,) = torch.autograd.grad(logits.softmax(-1)[:, target].sum(), points)
        scores.append((weights @ gradients[:, -1]) * difference)
    return torch.stack(scores)


def _last_position(output: Tensor, _: None, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points [steps, 1, out] at 0/steps .. (steps-1)/steps of the last position's output, weights, the whole way."""
    alphas = torch.arange(steps, dtype=output.dtype, device=output.device) / steps
    return alphas.view(-1, 1, 1) * output[:, -1:], torch.full_like(alphas, 1 / steps), output[0, -1]


def _all_positions(output: Tensor, baseline: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points [steps, tokens, out] from the baseline to the output, weights, the last position's whole way."""
    alphas = torch.linspace(0, 1, steps, dtype=torch.float64, device=output.device).to(output.dtype)
    weights = torch.full_like(alphas, 1 / steps)
    weights[0] /= 2
    weights[-1] /= 2
    difference = output - baseline
    return baseline + alphas.view(-1, 1, 1) * difference, weights, difference[0, -1]


@torch.no_grad()
def _outputs(model: nn.Module, projections: tuple[nn.Module, ...], input_ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """What each projection puts out, [1, tokens, out], and the last position's logits [vocabulary]."""
    outputs = []
    with contextlib.ExitStack() as stack:
        for projection in projections:
            stack.enter_context(_hook(projection, lambda _, args, output: outputs.append(output.clone())))
        logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    return outputs, logits


@contextlib.contextmanager
def _replaced(projection: nn.Module, points: Tensor) -> Iterator[None]:
    """The projection's output at its last positions, as many as `points` [steps, positions, out] has, is `points`."""

    def replace(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return torch.cat((output[:, : output.shape[1] - points.shape[1]], points), dim=1)

    with _hook(projection, replace):
        yield


@contextlib.contextmanager
def _hook(module: nn.Module, function: Callable) -> Iterator[None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()
