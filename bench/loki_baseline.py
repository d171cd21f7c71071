"""The published procedure of LoKI's attribution, a whole pass for each layer (arXiv 2505.22120), to compare with."""

import contextlib
from functools import partial

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
    if path == "last_position":
        moves = [_last_position(output, steps) for output in outputs]
    else:
        baselines, _ = _outputs(model, projections, torch.zeros_like(input_ids))
        moves = [_all_positions(*pair, steps) for pair in zip(outputs, baselines, strict=True)]
    scores = []
    for projection, (points, weights, difference) in zip(projections, moves, strict=True):
        with projection.register_forward_hook(partial(_replace_last, points.requires_grad_())):
            logits = model(input_ids=input_ids.expand(steps, -1), use_cache=False, logits_to_keep=1).logits[:, -1]
        (gradients,) = torch.autograd.grad(logits.softmax(-1)[:, target].sum(), points)
        scores.append((weights @ gradients[:, -1]) * difference)
    return torch.stack(scores)


def _last_position(output: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
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
            hook = projection.register_forward_hook(lambda _, args, output: outputs.append(output.clone()))
            stack.enter_context(hook)
        logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    return outputs, logits


def _replace_last(points: Tensor, _: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Replaces a projection's output at its last positions by `points` [steps, positions, out]."""
    return torch.cat((output[:, : output.shape[1] - points.shape[1]], points), dim=1)
