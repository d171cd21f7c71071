"""Scores of a model's knowledge vectors (LoKI, arXiv 2505.22120), all layers in one decoding step and one backward.

The published procedure runs a whole pass for each layer. But attention is causal, so gradients are needed only for the
outputs at the last position, and the last position is one decoding step. Each scaled copy of an output is a stream of
that step: layer l adds its own copies to those of the layers before it, and one backward gives the gradients of all.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gci_kernels.loki.all_positions import all_positions
from gci_kernels.loki.architecture import Architecture, frozen
from gci_kernels.loki.last_position import MAX_STREAMS, last_position

PATHS = ("last_position", "all_positions")


def attribute(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    path: str = "last_position",
    steps: int = 7,
    target: Tensor | int | None = None,
    projection: str | None = None,
) -> Tensor:
    """Integrated gradients of the target's probability at the last position, for each knowledge vector of each layer.

    A knowledge vector is a row of the projection that a layer's MLP ends in; its score belongs to the output it makes.

    "last_position": only the last position's output is scaled, by 0/steps .. (steps-1)/steps; the score is that output
    times the mean of the gradients. The published positions were made with this path. "all_positions": every
    position's output moves on a line from its value for all-zero token ids, under the same mask, to its own; the score
    is the last position's distance times the gradients there, by the trapezoid rule with weights 1/steps, halved at
    both ends, as in captum's LayerIntegratedGradients.

    A sample's scores do not depend on the other samples. Gradients are computed in the model's dtype. The model's mode
    and its parameters' requires_grad are changed meanwhile, and restored.

    Args:
        model: a causal language model of transformers, or a PeftModel around one, with attention "sdpa" or "eager".
        input_ids: [samples, tokens] int64, on the model's device.
        attention_mask: [samples, tokens], 1 or True where there is a token; padding may be left or right. Default: all.
        path: "last_position" or "all_positions".
        steps: points on the path; at least 1, and 2 for "all_positions".
        target: [samples] int64 token ids, or one for all. Default: each sample's most probable next token.
        projection: the name of the layers' last projection; default: `down_proj`, or what the model calls it.

    Returns:
        [samples, layers, out] float32 on the model's device.

    Raises:
        TypeError: input_ids or attention_mask is no tensor.
        ValueError: arguments of the wrong shape or values, or a model that is not supported.
        FloatingPointError: a score that is not finite.
    """
    arch = Architecture.of(model, projection)
    mask = _check(input_ids, attention_mask, path, steps)
    config: Any = arch.model.config
    vocabulary = config.get_text_config().vocab_size
    _check_ids("input_ids", input_ids[mask == 1], vocabulary)
    targets = _targets(target, input_ids, vocabulary)
    score = last_position if path == "last_position" else all_positions
    size = samples_together(arch, path, steps)
    scores = []
    with frozen(arch.model):
        for first in range(0, len(input_ids), size):
            batch = slice(first, first + size)
            ids, lengths = right_padded(input_ids[batch], mask[batch])
            scores.append(score(arch, ids, lengths, steps, None if targets is None else targets[batch]).float())
            bad = (~torch.isfinite(scores[-1])).nonzero()[:1].tolist()
            for sample, layer, _ in bad:
                raise FloatingPointError(f"sample {first + sample}: the scores of layer {layer} are not finite")
    return torch.cat(scores)


def samples_together(arch: Architecture, path: str, steps: int) -> int:
    """How many samples are scored at a time. "all_positions" moves whole prompts: one sample is work enough."""
    return max(1, MAX_STREAMS // (len(arch.layers) * steps)) if path == "last_position" else 1


def _check(input_ids: Tensor, attention_mask: Tensor | None, path: str, steps: int) -> Tensor:
    if path not in PATHS:
        raise ValueError(f"path={path!r} is unknown; allowed: {', '.join(map(repr, PATHS))}")
    least = PATHS.index(path) + 1
    if not isinstance(steps, int) or steps < least:
        raise ValueError(f"steps must be a whole number of at least {least} for {path!r}, got {steps!r}")
    for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if not isinstance(value, Tensor) and (value is not None or name == "input_ids"):
            raise TypeError(f"{name} must be a tensor [samples, tokens], got {type(value).__name__}")
    if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.dtype != torch.int64:
        got = f"{list(input_ids.shape)} {input_ids.dtype}"
        raise ValueError(f"input_ids must be [samples, tokens] int64, at least one of each, got {got}")
    if attention_mask is None:
        return torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        shapes = f"{list(input_ids.shape)}, got {list(attention_mask.shape)}"
        raise ValueError(f"attention_mask must be like input_ids, {shapes}")
    mask = attention_mask.to(input_ids.device, torch.int64)
    if ((mask != 0) & (mask != 1)).any():
        raise ValueError("attention_mask must hold 0 and 1 alone")
    if (mask.sum(1) == 0).any():
        raise ValueError(f"attention_mask leaves sample {int((mask.sum(1) == 0).nonzero()[0])} without a token")
    return mask


def _targets(target: Tensor | int | None, input_ids: Tensor, vocabulary: int) -> Tensor | None:
    if target is None:
        return None
    targets = torch.as_tensor(target, device=input_ids.device)
    if targets.dim() == 0:
        targets = targets.expand(len(input_ids))
    if targets.shape != (len(input_ids),) or targets.dtype != torch.int64:
        got = f"{list(targets.shape)} {targets.dtype}"
        raise ValueError(f"target must be a token id or [{len(input_ids)}] int64 token ids, got {got}")
    _check_ids("target", targets, vocabulary)
    return targets


def _check_ids(name: str, ids: Tensor, vocabulary: int) -> None:
    bad = ids[(ids < 0) | (ids >= vocabulary)]
    if len(bad):
        raise ValueError(f"{name} must hold token ids from 0 to {vocabulary - 1}, got {int(bad[0])}")


def right_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The samples' tokens [B, T], first to last, padded to the longest, and their lengths [B]."""
    lengths = mask.sum(1)
    width = int(lengths.max())
    # A stable sort by "is padding" keeps the tokens in order and brings them to the front.
    order = (1 - mask).argsort(dim=1, stable=True)[:, :width]
    # Padding may hold any id, even one outside the vocabulary.
    padded = torch.arange(width, device=ids.device) >= lengths[:, None]
    return ids.gather(1, order).masked_fill(padded, 0), lengths
