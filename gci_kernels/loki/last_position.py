"""The path "last_position": the scaled copies of an output are streams that lie along the sequence.

All streams of a sample share the keys and values of its prompt.
"""

from typing import Any

import torch
from torch import Tensor

from gci_kernels.loki.architecture import Architecture, PrefixLayer
from gci_kernels.loki.prompt import Prompt, probability_gradient, relative_error, run_prompt, run_step, sum_dtype

# Streams in one decoding step: enough for full speed, few enough that what backward needs stays near a gigabyte.
MAX_STREAMS = 512


def last_position(arch: Architecture, ids: Tensor, lengths: Tensor, steps: int, target: Tensor | None) -> Tensor:
    """Scores [B, layers, out] of `ids` [B, T], the first `lengths` [B] of each; `target` [B], or None."""
    prompt = run_prompt(arch, ids, lengths)
    size = max(1, MAX_STREAMS // (len(ids) * steps))
    scores: list[Tensor] = []
    # From the end: the last layer's group has the unscaled stream whose most probable token is the target.
    for stop in range(len(arch.layers), 0, -size):
        found, target = _score_group(arch, prompt, range(max(0, stop - size), stop), steps, target)
        scores = found + scores
    return torch.stack(scores, dim=1)


def _score_group(
    arch: Architecture, prompt: Prompt, group: range, steps: int, target: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """The scores [B, out] of each layer in `group`, from one decoding step with all their streams, and the target [B].

    Every layer of the group appends its streams as copies of what enters it, and scales them at its projection's
    output. The model's last layer appends one more and leaves it unscaled.
    """
    alphas = torch.arange(steps, device=prompt.first.device).to(prompt.first.dtype).div(steps).view(1, -1, 1)
    outputs: list[Tensor] = []
    leaves: list[Tensor] = []
    errors: list[Tensor] = []

    def before(number: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]] | None:
        if number < group.start:
            return None
        if number in group:
            added = prompt.states[number].expand(-1, steps + (number == arch.last), -1)
            hidden = added if number == group.start else torch.cat((hidden, added), dim=1)
        mask = _stream_mask(kwargs.get("attention_mask"), hidden, prompt.prefix[number][0].shape[-2])
        return hidden, kwargs | {"attention_mask": mask}

    def projected(number: int, output: Tensor) -> Tensor | None:
        if number not in group:
            return None
        unscaled = output[:, -1:].detach().clone()
        if number < arch.last:
            errors.append(relative_error(unscaled, prompt.outputs[number]))
        outputs.append(unscaled[:, 0])
        leaves.append((unscaled * alphas).requires_grad_())
        parts = [output[:, : (number - group.start) * steps], leaves[-1]]
        return torch.cat(parts + [unscaled] if number == arch.last else parts, dim=1)

    layers = [PrefixLayer(*prefix) for prefix in prompt.prefix]
    logits = run_step(arch, prompt, layers, errors, before=before, projected=projected)
    logits = logits.view(len(prompt.first), -1, logits.shape[-1])
    if target is None:
        target = logits[:, -1].argmax(-1)
    gradients = torch.autograd.grad(logits, leaves, probability_gradient(logits, target[:, None]))
    sums = (gradient.sum(1, dtype=sum_dtype(gradient)) for gradient in gradients)
    return [output * total / steps for output, total in zip(outputs, sums, strict=True)], target


def _stream_mask(row: Tensor | None, hidden: Tensor, prefix: int) -> Tensor:
    """An additive mask [B or 1, heads or 1, S, prefix + S]: each of the S streams attends to the prefix and itself.

    Args:
        row: the mask of a single decoding step, [B, heads or 1, 1, prefix + 1], boolean or additive; None: no mask.
        hidden: [B, S, hidden], for the number of streams, dtype and device.
        prefix: the number of positions before the final one.
    """
    streams, closed = hidden.shape[1], torch.finfo(hidden.dtype).min
    if row is None:
        row = hidden.new_zeros(1, 1, 1, prefix)
    elif row.dtype == torch.bool:
        row = torch.zeros_like(row, dtype=hidden.dtype).masked_fill_(~row, closed)
    seen = row[..., :prefix].expand(-1, -1, streams, -1)
    diagonal = hidden.new_full((streams, streams), closed).fill_diagonal_(0)
    return torch.cat((seen, diagonal.expand(*seen.shape[:2], -1, -1)), dim=-1)
