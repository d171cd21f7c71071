"""The path "all_positions": each point of it is a whole moved prompt, with its own keys and values."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gci_kernels.loki.architecture import Architecture, CollectingCache, FullLengthLayer, StopForward, hidden_of, hooks
from gci_kernels.loki.product import products
from gci_kernels.loki.prompt import Prompt, probability_gradient, relative_error, run_prompt, run_step, sum_dtype
from gci_kernels.loki.workers import workers

# Most bytes of the moved prompts' keys and values, by device type: on a CPU few enough that the allocator reuses
# memory, as new pages cost more than a few decoding steps more.
CACHE_BYTES = {"cpu": 1 << 28}
OTHER_CACHE_BYTES = 1 << 30
# Most tokens that go through a layer at a time: on a CPU, what fits a core's caches.
TOKENS_TOGETHER = {"cpu": 640}
OTHER_TOKENS_TOGETHER = 1 << 14


def all_positions(arch: Architecture, ids: Tensor, lengths: Tensor, steps: int, target: Tensor | None) -> Tensor:
    """Scores [1, layers, out] of one sample `ids` [1, T] without padding; `target` [1], or None.

    Each layer moves copies of the whole prompt, one for each point of its path; they run without gradient through the
    later layers, for their keys and values. Then the final positions of all moved prompts go through one decoding step
    together with that of the unmoved prompt, which is the end of every layer's path.
    """
    baselines = _baselines(arch, ids)
    prompt = run_prompt(arch, ids, lengths)
    totals: dict[int, Tensor] = {}
    differences: list[Tensor] = []
    hidden, points = prompt.first, steps - 1
    count = min(points, torch.get_num_threads()) if ids.device.type == "cpu" else 1
    parts = _parts(ids, points, count)
    with workers(count) as run:
        for group in _groups(prompt, points):
            caches, moved = _allocate_caches(prompt, group, points), []
            for row, layer in enumerate(group):
                hidden, prompts, path = _move(arch, prompt, layer, hidden, baselines[layer], steps)
                rows = slice(1 + row * points, 1 + (row + 1) * points)
                later = [(keys[rows], values[rows]) for keys, values in caches[layer + 1 :]]
                # A list, so that what a part raises is raised here.
                list(run(functools.partial(_fill_caches, arch, prompt, layer + 1, prompts, later), parts))
                moved.append(path)
            differences += [path.difference for path in moved]
            ends = range(len(arch.layers)) if arch.last in group else range(0)
            target = _add_gradients(arch, prompt, moved, caches, ends, totals, target)
    scores = [difference * totals[layer] / steps for layer, difference in enumerate(differences)]
    return torch.stack(scores)[None]


def _parts(ids: Tensor, points: int, count: int) -> list[slice]:
    """The moved prompts in parts that run through the layers together, shared evenly by `count` workers."""
    tokens = TOKENS_TOGETHER.get(ids.device.type, OTHER_TOKENS_TOGETHER)
    parts = min(points, count * math.ceil(points * ids.shape[1] / (tokens * count)))
    bounds = [points * part // parts for part in range(parts + 1)]
    return list(map(slice, bounds, bounds[1:]))


def _groups(prompt: Prompt, points: int) -> Iterator[range]:
    """Consecutive layers whose moved prompts' keys and values together fit the limit, one layer at least."""
    first = size = 0
    limit = CACHE_BYTES.get(prompt.first.device.type, OTHER_CACHE_BYTES)
    for layer in range(len(prompt.prefix)):
        size += points * sum(tensor.nbytes for pair in prompt.prefix[layer + 1 :] for tensor in pair)
        if size > limit or layer == len(prompt.prefix) - 1:
            yield range(first, layer + 1)
            first, size = layer + 1, 0


def _allocate_caches(prompt: Prompt, group: range, points: int) -> list[tuple[Tensor, Tensor]]:
    """For each layer, keys and values [rows, heads, T, size]: the prompt's own in the first row, the rest not yet set.

    The other rows are those of the moved prompts that pass the layer, `points` of each earlier layer in the group.
    """

    def allocate(layer: int, prefix: Tensor) -> Tensor:
        _, heads, others, size = prefix.shape
        rows = 1 + points * len(range(group.start, min(layer, group.stop)))
        cache = prefix.new_empty(rows, heads, others + 1, size)
        cache[:1, :, :-1] = prefix
        return cache

    return [(allocate(layer, keys), allocate(layer, values)) for layer, (keys, values) in enumerate(prompt.prefix)]


@dataclass
class _MovedPrompts:
    """The n points of one layer's path, its end left out, at the final position.

    Attributes:
        layer: the layer's number.
        difference: [out], the distance from the baseline to the final position's output.
        leaf: [n, 1, out], the moved outputs, for which gradients are computed.
        state: [n, 1, hidden], what leaves the layer, with its graph back to the leaf.
    """

    layer: int
    difference: Tensor
    leaf: Tensor
    state: Tensor


def _baselines(arch: Architecture, ids: Tensor) -> list[Tensor]:
    """For each layer, its projection's output [1, T, out] for all-zero token ids."""
    outputs: list[Tensor] = []

    def projected(number: int, output: Tensor) -> None:
        outputs.append(output.clone())
        if number == arch.last:
            raise StopForward

    with torch.no_grad(), hooks(arch, projected=projected):
        arch.run(input_ids=torch.zeros_like(ids), use_cache=False)
    return outputs


def _move(
    arch: Architecture, prompt: Prompt, layer: int, hidden: Tensor, baseline: Tensor, steps: int
) -> tuple[Tensor, Tensor, _MovedPrompts]:
    """Run `layer` on the prompt's own hidden states [1, T, hidden]: its output, unmoved and moved [n, T, hidden].

    The moved outputs get a dimension of their own in front, which broadcasts through what the layer does after its
    projection (adds a residual, perhaps normalises): nothing before the projection is computed twice.

    Raises:
        ValueError: the rest of the layer does not take a further dimension.
    """
    alphas = torch.linspace(0, 1, steps, device=hidden.device, dtype=torch.float64)[:-1].to(hidden.dtype)
    captured: dict[str, Tensor] = {}

    def projected(number: int, output: Tensor) -> Tensor | None:
        if number != layer:
            return None
        difference = output - baseline
        points = baseline + alphas.view(-1, 1, 1, 1) * difference
        captured["difference"], captured["leaf"] = difference[0, -1], points[:, 0, -1:].clone().requires_grad_()
        return torch.cat((output[None], torch.cat((points[:, :, :-1], captured["leaf"][:, None]), dim=2)))

    with hooks(arch, projected=projected):
        output = _call(arch, prompt, layer, hidden, CollectingCache())
    if output is None or output.shape != (steps, *hidden.shape):
        raise ValueError(
            f"layer {layer} does not take one more dimension after its projection: use path='last_position'"
        )
    return output[0].detach(), output[1:, 0].detach(), _MovedPrompts(layer, state=output[1:, 0, -1:], **captured)


@torch.no_grad()
def _fill_caches(
    arch: Architecture, prompt: Prompt, first: int, prompts: Tensor, caches: list[tuple[Tensor, Tensor]], part: slice
) -> None:
    """Write keys and values of a `part` of `prompts` [n, T, hidden], which enter layer `first`.

    Args:
        arch: the model.
        prompt: the pass over the unmoved prompt.
        first: the number of the layer.
        prompts: the hidden states of all n moved prompts.
        caches: for each layer from `first` on, the keys and values [n, heads, T, size] of all n.
        part: which of them to run.
    """
    hidden: Tensor | None = prompts[part]
    for layer, (keys, values) in enumerate(caches, first):
        assert hidden is not None, "only the last layer stops"
        cache = CollectingCache(last=arch.last)
        with products(prompts):
            hidden = _call(arch, prompt, layer, hidden, cache)
        keys[part], values[part] = cache.collected[layer]


def _call(arch: Architecture, prompt: Prompt, layer: int, hidden: Tensor, cache: CollectingCache) -> Tensor | None:
    """One decoder layer, called as in the prompt's pass but with another cache; None where the cache stopped it."""
    kwargs: dict[str, Any] = {
        name: cache if isinstance(value, CollectingCache) else value for name, value in prompt.calls[layer].items()
    }
    try:
        return hidden_of(arch.layers[layer](hidden, **kwargs))
    except StopForward:
        return None


def _add_gradients(
    arch: Architecture,
    prompt: Prompt,
    moved: list[_MovedPrompts],
    caches: list[tuple[Tensor, Tensor]],
    ends: range,
    totals: dict[int, Tensor],
    target: Tensor | None,
) -> Tensor:
    """One decoding step and its backward: adds the weighted gradients of each layer's path to `totals` [out].

    The step's first row is the prompt's own final position, the others are those of the moved prompts.

    Args:
        arch: the model.
        prompt: the pass over the unmoved prompt.
        moved: the paths of the group's layers, without their ends.
        caches: every layer's keys and values.
        ends: the layers whose paths' ends are added too.
        totals: the sums so far, by layer.
        target: [1]; None: the most probable token.

    Returns:
        The target [1].
    """
    states = {path.layer: path.state for path in moved}
    taps: dict[int, Tensor] = {}
    errors: list[Tensor] = []

    def projected(number: int, output: Tensor) -> Tensor | None:
        if number < arch.last:
            errors.append(relative_error(output[:1].detach(), prompt.outputs[number]))
        if number not in ends:
            return None
        taps[number] = torch.zeros_like(output[:1], requires_grad=True)
        return torch.cat((output[:1] + taps[number], output[1:]))

    def after(number: int, hidden: Tensor) -> Tensor | None:
        return torch.cat((hidden, states[number])) if number in states else None

    layers = [FullLengthLayer(*pair) for pair in caches]
    logits = run_step(arch, prompt, layers, errors, projected=projected, after=after)
    logits = logits.view(-1, logits.shape[-1])
    if target is None:
        target = logits[:1].argmax(-1)
    # The trapezoid rule halves both ends: a tap is its path's end, a leaf's first row the beginning.
    leaves = [*taps.items(), *((path.layer, path.leaf) for path in moved)]
    gradients = torch.autograd.grad(logits, [leaf for _, leaf in leaves], probability_gradient(logits, target))
    for (number, _), gradient in zip(leaves, gradients, strict=True):
        gradient = gradient[:, 0].to(sum_dtype(gradient))
        totals[number] = totals.get(number, torch.zeros_like(gradient[0])) + gradient.sum(0) - gradient[0] / 2
    return target
