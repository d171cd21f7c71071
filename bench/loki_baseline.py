"""The published procedure of LoKI's attribution, a whole pass for each layer (arXiv 2505.22120), to compare with."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gci_kernels.loki.architecture import Architecture


def published_attribution(
    model: nn.Module, input_ids: Tensor, *, path: str = "last_position", steps: int = 7, target: Tensor | None = None
) -> Tensor:
    """Scores of one sample, computed as in the published code, with the steps of a path in one batch.

    For every layer, the prompt is repeated `steps` times, the output of the layer's projection is replaced by the
    points of the path, and the target's probability is differentiated with respect to them. Two costs of the published
    code are left out: it also fills a cache of keys and values, and runs a pass for each layer to get its outputs.

    Args:
        model: a causal language model; none of its parameters may require a gradient.
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
    """Points [steps, 1, out] at 0/steps .. (steps-1)/steps of the last position's output, weights, the distance."""
    alphas = torch.arange(steps, dtype=output.dtype, device=output.device) / steps
    return alphas.view(-1, 1, 1) * output[:, -1:], torch.full_like(alphas, 1 / steps), output[0, -1]


def _all_positions(output: Tensor, baseline: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points [steps, tokens, out] from the baseline to the output, weights, the last position's distance."""
    alphas = torch.linspace(0, 1, steps, dtype=torch.float64, device=output.device).to(output.dtype)
    weights = torch.full_like(alphas, 1 / steps)
    weights[0] /= 2
    weights[-1] /= 2
    difference = output - baseline
    return baseline + alphas.view(-1, 1, 1) * difference, weights, difference[0, -1]


@torch.no_grad()
def _outputs(model: nn.Module, projections: tuple[nn.Module, ...], input_ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Each projection's output [1, tokens, out], and the last position's logits [vocabulary]."""
    outputs = []
    with contextlib.ExitStack() as stack:
        for projection in projections:
            stack.enter_context(_hook(projection, lambda _, args, output: outputs.append(output.clone())))
        logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    return outputs, logits


@contextlib.contextmanager
def _replaced(projection: nn.Module, points: Tensor) -> Iterator[None]:
    """Replaces the projection's output at its last positions by `points` [steps, positions, out]."""

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
