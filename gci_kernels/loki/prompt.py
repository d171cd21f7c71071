"""One pass over whole prompts, and the decoding step of their last position that every walk is."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gci_kernels.loki.architecture import Architecture, Collector, PrefixLayer, hooks

# A stream that nothing moved repeats the prompt's own numbers to rounding, or the model is not understood.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
HALF_TOLERANCE = 0.2


@dataclass
class Prompt:
    """What one pass over whole prompts leaves behind: B samples of at most T tokens.

    Attributes:
        step: the inputs of the decoding step that computes the final position again.
        first: [B, T, hidden], what enters the first layer.
        states: for each layer, what enters it at the final position, [B, 1, hidden].
        outputs: for each layer but the last, its projection's output there, [B, 1, out].
        calls: for each layer, its keyword arguments, but for hidden_states.
        prefix: for each layer, the other positions' keys and values, [B, heads, T-1, size], the last T-1 columns
            of the step's mask.
    """

    step: dict[str, Tensor]
    first: Tensor | None = None
    states: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    calls: list[dict] = field(default_factory=list)
    prefix: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def run_prompt(arch: Architecture, ids: Tensor, lengths: Tensor) -> Prompt:
    """One pass over `ids` [B, T] int64, of which each sample's first `lengths` [B] int64 are its tokens.

    Padding on the right needs no mask: causal attention never looks there. The step's padding is on the left, so that
    a sliding window counts from the final position.
    """
    batch, width = ids.shape
    everywhere = torch.arange(width, device=ids.device)
    final = (lengths - 1)[:, None]
    equal = bool((lengths == width).all())
    step = {"input_ids": ids.gather(1, final), "position_ids": final}
    prompt = Prompt(step if equal else step | {"attention_mask": (everywhere >= width - lengths[:, None]).long()})
    cache = Collector(last=arch.last)

    def before(number: int, hidden: Tensor, kwargs: dict) -> None:
        if number == 0:
            prompt.first = hidden
        prompt.states.append(_at(hidden, final))
        prompt.calls.append(kwargs)

    def projected(number: int, output: Tensor) -> None:
        if output.dim() != 3:
            got = list(output.shape)
            raise ValueError(f"layer {number}'s projection must give [batch, tokens, out], it gave {got}")
        prompt.outputs.append(_at(output, final))

    with torch.no_grad(), hooks(arch, before=before, projected=projected):
        arch.run(input_ids=ids, position_ids=everywhere.expand(batch, -1), past_key_values=cache, use_cache=True)
    if sorted(cache.kept) != list(range(len(arch.layers))):
        raise ValueError(f"{type(arch.model).__name__}: only layers {sorted(cache.kept)} keep keys and values")
    # Column t of the step is position t - (width - length); what the mask closes may hold anything finite.
    source = None if equal else (everywhere[:-1] - width + lengths[:, None]).clamp_min(0)
    prompt.prefix = [tuple(_prefix(tensor, source) for tensor in pair) for _, pair in sorted(cache.kept.items())]
    return prompt


def _at(tensor: Tensor, positions: Tensor) -> Tensor:
    """The rows of `tensor` [B, T, size] at `positions` [B, 1]: [B, 1, size]."""
    return tensor.gather(1, positions[..., None].expand(-1, -1, tensor.shape[-1]))


def _prefix(tensor: Tensor, source: Tensor | None) -> Tensor:
    """Of keys or values [B, heads, T, size], all but the final position; `source` [B, T-1]: where each comes from."""
    if source is None:
        return tensor[:, :, :-1]
    return tensor.gather(2, source[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def run_step(
    arch: Architecture, prompt: Prompt, layers: list[PrefixLayer], errors: list[Tensor], **watch: Callable
) -> Tensor:
    """The logits [rows, streams, vocabulary] of the final position's decoding step, widened by the hooks in `watch`.

    Args:
        layers: every layer's past.
        errors: filled by the hooks with :func:`relative_error` of streams that nothing moved.

    Raises:
        ValueError: such a stream doesn't repeat what the whole pass had: the model depends on something else.
    """
    with hooks(arch, **watch):
        logits = arch.run(**prompt.step, past_key_values=Cache(layers=layers), use_cache=True).logits
    worst = float(torch.stack(errors).max()) if errors else 0.0
    allowed = TOLERANCE.get(arch.model.dtype, HALF_TOLERANCE)
    if worst > allowed:
        raise ValueError(
            f"{type(arch.model).__name__} can't be walked a position at a time: a decoding step differs from the whole "
            f"pass by {worst:.1e} of its size, {allowed:.0e} is allowed"
        )
    return logits


def probability_gradient(logits: Tensor, target: Tensor) -> Tensor:
    """d softmax(logits)[target] / d logits, for logits [..., vocabulary] and a target for each row."""
    probabilities = logits.detach().softmax(-1, dtype=wide(logits))
    target = target.expand(logits.shape[:-1])[..., None]
    chosen = probabilities.gather(-1, target)
    # The sum of the others keeps its digits where the target's probability is almost 1; 1 - chosen has none left.
    others = probabilities.scatter_(-1, target, 0).sum(-1, keepdim=True)
    gradient = probabilities.mul_(-chosen).scatter_(-1, target, chosen * others)
    return gradient.to(logits.dtype)


def wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    actual, expected = actual.to(wide(actual)), expected.to(wide(expected))
    return (actual - expected).norm() / expected.norm().clamp_min(torch.finfo(actual.dtype).tiny)
