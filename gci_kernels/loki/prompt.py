"""One pass over whole prompts, and the decoding step that computes their final position once more."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gci_kernels.loki.architecture import Architecture, BeforeLayer, CollectingCache, OutputHook, PrefixLayer, hooks

# The decoding step must give an unchanged stream the same numbers as the whole pass, to rounding; else the model
# depends on something that the step does not have.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
HALF_TOLERANCE = 0.2


@dataclass(frozen=True)
class Prompt:
    """What one pass over whole prompts gives: B samples of at most T tokens.

    Attributes:
        step: the inputs of the decoding step that computes the final position again.
        first: [B, T, hidden], the hidden states that enter the first layer.
        states: for each layer, what enters it at the final position, [B, 1, hidden].
        outputs: for each layer but the last, its projection's output there, [B, 1, out].
        calls: for each layer, its keyword arguments, but for hidden_states.
        prefix: for each layer, the other positions' keys and values, [B, heads, T-1, size], the last T-1 columns
            of the step's mask.
    """

    step: dict[str, Tensor]
    first: Tensor
    states: list[Tensor]
    outputs: list[Tensor]
    calls: list[dict[str, Any]]
    prefix: list[tuple[Tensor, Tensor]]


def run_prompt(arch: Architecture, ids: Tensor, lengths: Tensor) -> Prompt:
    """One pass over `ids` [B, T] int64, of which each sample's first `lengths` [B] int64 are its tokens.

    Padding on the right needs no mask, as attention is causal. The step's padding is on the left, so that a sliding
    window counts from the final position.

    Raises:
        ValueError: a projection gives something other than [batch, tokens, out], or a layer caches no keys and values.
    """
    batch, width = ids.shape
    everywhere = torch.arange(width, device=ids.device)
    final = (lengths - 1)[:, None]
    equal = bool((lengths == width).all())
    step = {"input_ids": ids.gather(1, final), "position_ids": final}
    if not equal:
        step["attention_mask"] = (everywhere >= width - lengths[:, None]).long()
    entering: list[Tensor] = []
    states: list[Tensor] = []
    outputs: list[Tensor] = []
    calls: list[dict[str, Any]] = []
    cache = CollectingCache(last=arch.last)

    def before(number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        if number == 0:
            entering.append(hidden)
        states.append(_at(hidden, final))
        calls.append(kwargs)

    def projected(number: int, output: Tensor) -> None:
        if output.dim() != 3:
            got = list(output.shape)
            raise ValueError(f"layer {number}'s projection must give [batch, tokens, out], it gave {got}")
        outputs.append(_at(output, final))

    with torch.no_grad(), hooks(arch, before=before, projected=projected):
        arch.run(input_ids=ids, position_ids=everywhere.expand(batch, -1), past_key_values=cache, use_cache=True)
    if sorted(cache.collected) != list(range(len(arch.layers))):
        raise ValueError(f"{type(arch.model).__name__}: only layers {sorted(cache.collected)} cache keys and values")
    # Column t of the step is position t - (width - length); what the mask hides may hold anything finite.
    source = None if equal else (everywhere[:-1] - width + lengths[:, None]).clamp_min(0)
    pairs = [cache.collected[number] for number in range(len(arch.layers))]
    prefix = [(_prefix(keys, source), _prefix(values, source)) for keys, values in pairs]
    return Prompt(step, entering[0], states, outputs, calls, prefix)


def _at(tensor: Tensor, positions: Tensor) -> Tensor:
    """The rows of `tensor` [B, T, size] at `positions` [B, 1]: [B, 1, size]."""
    return tensor.gather(1, positions[..., None].expand(-1, -1, tensor.shape[-1]))


def _prefix(tensor: Tensor, source: Tensor | None) -> Tensor:
    """Of keys or values [B, heads, T, size], all but the final position; `source` [B, T-1]: where each comes from."""
    if source is None:
        return tensor[:, :, :-1]
    return tensor.gather(2, source[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def run_step(
    arch: Architecture,
    prompt: Prompt,
    layers: Sequence[PrefixLayer],
    errors: list[Tensor],
    *,
    before: BeforeLayer | None = None,
    projected: OutputHook | None = None,
    after: OutputHook | None = None,
) -> Tensor:
    """The logits [rows, streams, vocabulary] of the final position's decoding step, to which hooks add rows or streams.

    Args:
        arch: the model.
        prompt: the pass that the step belongs to.
        layers: every layer's cache.
        errors: the hooks append :func:`relative_error` of unchanged streams to it.
        before, projected, after: as for :func:`.hooks`.

    Raises:
        ValueError: such a stream differs from what the whole pass gave: the model depends on something else.
    """
    with hooks(arch, before=before, projected=projected, after=after):
        logits = arch.run(**prompt.step, past_key_values=Cache(layers=list(layers)), use_cache=True).logits
    worst = float(torch.stack(errors).max()) if errors else 0.0
    allowed = TOLERANCE.get(arch.model.dtype, HALF_TOLERANCE)
    if worst > allowed:
        raise ValueError(
            f"{type(arch.model).__name__} can't be computed a position at a time: a decoding step differs from the "
            f"whole pass by {worst:.1e} of its size, {allowed:.0e} is allowed"
        )
    return logits


def probability_gradient(logits: Tensor, target: Tensor) -> Tensor:
    """d softmax(logits)[target] / d logits, in the shape and dtype of `logits` [..., vocabulary].

    `target` int64 holds a token id for each row of logits, or broadcasts to that. Computed in float32 at least.
    """
    probabilities = logits.detach().softmax(-1, dtype=sum_dtype(logits))
    target = target.expand(logits.shape[:-1])[..., None]
    chosen = probabilities.gather(-1, target)
    # The sum of the others keeps its digits where the target's probability is almost 1; 1 - chosen has none left.
    others = probabilities.scatter_(-1, target, 0).sum(-1, keepdim=True)
    gradient = probabilities.mul_(-chosen).scatter_(-1, target, chosen * others)
    return gradient.to(logits.dtype)


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to sum in: the tensor's own, float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """|actual - expected| / |expected| over all values, a scalar tensor, so that nothing waits for the device."""
    actual, expected = actual.to(sum_dtype(actual)), expected.to(sum_dtype(expected))
    return (actual - expected).norm() / expected.norm().clamp_min(torch.finfo(actual.dtype).tiny)
