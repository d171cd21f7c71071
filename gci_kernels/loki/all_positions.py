"""The path "all_positions": each point of it has a whole prompt, so keys and values, of its own."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gci_kernels.loki.architecture import Architecture, Collector, Stop, WholeLayer, hidden_of, hooks
from gci_kernels.loki.product import products
from gci_kernels.loki.prompt import Prompt, probability_gradient, relative_error, run_prompt, run_step, wide
from gci_kernels.loki.workers import workers

# Keys and values of moved prompts that are kept at a time: on a CPU, few enough that memory in use is used again, as
# fresh pages cost more than some walks more.
KEPT_BYTES = {"cpu": 1 << 28}
MANY_BYTES = 1 << 30
# Tokens that a layer takes at a time: on a CPU, what a core's caches hold.
TOKENS_TOGETHER = {"cpu": 640}
MANY_TOKENS = 1 << 14


def all_positions(arch: Architecture, ids: Tensor, lengths: Tensor, steps: int, target: Tensor | None) -> Tensor:
    """Scores [1, layers, out] of one sample `ids` [1, T] without padding; `target` [1], or None.

    Behind the layer that moved it, a whole prompt runs without gradient through the later layers to give their keys and
    values. Then the last positions of all moved prompts walk together with one that nothing moved: the path's end,
    which is the same for every layer.
    """
    baselines = _baselines(arch, ids)
    prompt = run_prompt(arch, ids, lengths)
    totals, differences = {}, []
    hidden, points = prompt.first, steps - 1
    count = min(points, torch.get_num_threads()) if ids.device.type == "cpu" else 1
    parts = _parts(ids, points, count)
    with workers(count) as run:
        for group in _groups(prompt, points):
            past, moved = _past(prompt, group, points), []
            for row, layer in enumerate(group):
                hidden, prompts, one = _move(arch, prompt, layer, hidden, baselines[layer], steps)
                rows = slice(1 + row * points, 1 + (row + 1) * points)
                later = [[whole[rows] for whole in pair] for pair in past[layer + 1 :]]
                # A list, so that what a part raises is raised here.
                list(run(functools.partial(_prefixes, arch, prompt, layer + 1, prompts, later), parts))
                moved.append(one)
            differences += [one.difference for one in moved]
            ends = range(len(arch.layers)) if arch.last in group else range(0)
            target = _walk(arch, prompt, moved, past, ends, totals, target)
    scores = [difference * totals[layer] / steps for layer, difference in enumerate(differences)]
    return torch.stack(scores)[None]


def _parts(ids: Tensor, points: int, count: int) -> list[slice]:
    """Which of the moved prompts run through the layers together, as many parts as `count` workers share evenly."""
    tokens = TOKENS_TOGETHER.get(ids.device.type, MANY_TOKENS)
    parts = min(points, count * math.ceil(points * ids.shape[1] / (tokens * count)))
    bounds = [points * part // parts for part in range(parts + 1)]
    return list(map(slice, bounds, bounds[1:]))


def _groups(prompt: Prompt, points: int) -> Iterator[range]:
    """The layers in turn, so many together as their moved prompts' keys and values may be kept, and one at least."""
    first = kept = 0
    most = KEPT_BYTES.get(prompt.first.device.type, MANY_BYTES)
    for layer in range(len(prompt.prefix)):
        kept += points * sum(tensor.nbytes for pair in prompt.prefix[layer + 1 :] for tensor in pair)
        if kept > most or layer == len(prompt.prefix) - 1:
            yield range(first, layer + 1)
            first, kept = layer + 1, 0


def _past(prompt: Prompt, group: range, points: int) -> list[tuple[Tensor, Tensor]]:
    """For each layer, room for the keys and values [rows, heads, T, size] of a walk, the prompt's own in its first row.

    The other rows are those of the moved prompts that have come by, `points` of each of the group's earlier layers.
    """

    def room(layer: int, own: Tensor) -> Tensor:
        _, heads, others, size = own.shape
        rows = 1 + points * len(range(group.start, min(layer, group.stop)))
        whole = own.new_empty(rows, heads, others + 1, size)
        whole[:1, :, :-1] = own
        return whole

    return [tuple(room(layer, own) for own in pair) for layer, pair in enumerate(prompt.prefix)]


@dataclass
class _Moved:
    """The points of one layer's path, all n but the end, at the last position.

    Attributes:
        layer: the layer's number.
        difference: [out], how far the last position's output moves in all.
        leaf: [n, 1, out], the moved outputs, which the gradients are for.
        state: [n, 1, hidden], what leaves the layer, with its graph back to the leaf.
    """

    layer: int
    difference: Tensor
    leaf: Tensor
    state: Tensor


def _baselines(arch: Architecture, ids: Tensor) -> list[Tensor]:
    """For each layer, its projection's output [1, T, out] for all-zero token ids."""
    outputs = []

    def projected(number: int, output: Tensor) -> None:
        outputs.append(output.clone())
        if number == arch.last:
            raise Stop

    with torch.no_grad(), hooks(arch, projected=projected):
        arch.run(input_ids=torch.zeros_like(ids), use_cache=False)
    return outputs


def _move(
    arch: Architecture, prompt: Prompt, layer: int, hidden: Tensor, baseline: Tensor, steps: int
) -> tuple[Tensor, Tensor, _Moved]:
    """Run `layer` on the prompt's own hidden states [1, T, hidden]: what leaves it, unmoved and moved [n, T, hidden].

    The moved outputs get a dimension of their own in front, which broadcasts through whatever the layer does behind its
    projection (adds a residual, perhaps normalises): nothing before it is computed twice.
    """
    alphas = torch.linspace(0, 1, steps, device=hidden.device, dtype=torch.float64)[:-1].to(hidden.dtype)
    made = {}

    def projected(number: int, output: Tensor) -> Tensor | None:
        if number != layer:
            return None
        difference = output - baseline
        points = baseline + alphas.view(-1, 1, 1, 1) * difference
        made["difference"], made["leaf"] = difference[0, -1], points[:, 0, -1:].clone().requires_grad_()
        return torch.cat((output[None], torch.cat((points[:, :, :-1], made["leaf"][:, None]), dim=2)))

    with hooks(arch, projected=projected):
        output = _call(arch, prompt, layer, hidden, Collector())
    if output.shape != (steps, *hidden.shape):
        raise ValueError(
            f"layer {layer} can't carry one dimension more behind its projection: use path='last_position'"
        )
    return output[0].detach(), output[1:, 0].detach(), _Moved(layer, state=output[1:, 0, -1:], **made)


@torch.no_grad()
def _prefixes(
    arch: Architecture, prompt: Prompt, first: int, prompts: Tensor, past: list[list[Tensor]], part: slice
) -> None:
    """Write keys and values of a `part` of `prompts` [n, T, hidden], which enter layer `first`.

    Args:
        past: for each layer from `first` on, where all n prompts' keys and values [n, heads, T, size] belong.
    """
    x = prompts[part]
    for layer, pair in enumerate(past, first):
        cache = Collector(last=arch.last)
        with products(prompts):
            x = _call(arch, prompt, layer, x, cache)
        for whole, own in zip(pair, cache.kept[layer], strict=True):
            whole[part] = own


def _call(arch: Architecture, prompt: Prompt, layer: int, hidden: Tensor, cache: Collector) -> Tensor | None:
    """One decoder layer, called as the prompt's pass called it, with another cache; None where that stopped it."""
    kwargs = {name: cache if isinstance(value, Collector) else value for name, value in prompt.calls[layer].items()}
    try:
        return hidden_of(arch.layers[layer](hidden, **kwargs))
    except Stop:
        return None


def _walk(
    arch: Architecture,
    prompt: Prompt,
    moved: list[_Moved],
    past: list[tuple[Tensor, Tensor]],
    ends: range,
    totals: dict,
    target: Tensor | None,
) -> Tensor:
    """Add the weighted gradients to `totals` [out] by layer: the moved prompts', and the paths' ends' of layers `ends`.

    One decoding step: its first row is the prompt's own last position, the others are those of the moved prompts.
    Returns the target [1].
    """
    states = {group.layer: group.state for group in moved}
    taps, errors = {}, []

    def projected(number: int, output: Tensor) -> Tensor | None:
        if number < arch.last:
            errors.append(relative_error(output[:1].detach(), prompt.outputs[number]))
        if number not in ends:
            return None
        taps[number] = torch.zeros_like(output[:1], requires_grad=True)
        return torch.cat((output[:1] + taps[number], output[1:]))

    def after(number: int, hidden: Tensor) -> Tensor | None:
        return torch.cat((hidden, states[number])) if number in states else None

    layers = [WholeLayer(*pair) for pair in past]
    logits = run_step(arch, prompt, layers, errors, projected=projected, after=after)
    logits = logits.view(-1, logits.shape[-1])
    if target is None:
        target = logits[:1].argmax(-1)
    # The trapezoid rule halves both ends: a tap is its path's end, a leaf's first row the beginning.
    leaves = [*taps.items(), *((group.layer, group.leaf) for group in moved)]
    gradients = torch.autograd.grad(logits, [leaf for _, leaf in leaves], probability_gradient(logits, target))
    for (number, _), gradient in zip(leaves, gradients, strict=True):
        gradient = gradient[:, 0].to(wide(gradient))
        totals[number] = totals.get(number, 0) + gradient.sum(0) - gradient[0] / 2
    return target
