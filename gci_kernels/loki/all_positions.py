"""The path "all_positions": each point of it has a whole prompt, so keys and values, of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gci_kernels.loki.architecture import Architecture, Collector, PrefixLayer, Stop, hidden_of, hooks
from gci_kernels.loki.prompt import Prompt, probability_gradient, relative_error, run_prompt, run_step, wide

# Keys and values of moved prompts that are kept at a time.
MAX_PREFIX_BYTES = 1 << 30
# Tokens that a layer takes at a time: on a CPU, what its caches hold.
TOKENS_TOGETHER = {"cpu": 512}
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
    moved: list[_Moved] = []
    hidden = prompt.first
    for layer, baseline in enumerate(baselines):
        hidden, group = _move(arch, prompt, layer, hidden, baseline, steps)
        differences.append(group.difference)
        moved.append(group)
        if layer == arch.last or sum(group.bytes for group in moved) > MAX_PREFIX_BYTES:
            ends = range(len(arch.layers)) if layer == arch.last else range(0)
            target = _walk(arch, prompt, moved, ends, totals, target)
            moved = []
    scores = [difference * totals[layer] / steps for layer, difference in enumerate(differences)]
    return torch.stack(scores)[None]


@dataclass
class _Moved:
    """The prompts that one layer's moved outputs make: n points of its path, all but the end.

    Attributes:
        layer: the layer's number.
        difference: [out], how far the last position's output moves in all.
        leaf: [n, 1, out], the moved outputs at the last position, which the gradients are for.
        state: [n, 1, hidden], what leaves the layer there, with its graph back to the leaf.
        prefix: for each later layer, the keys and values of the other positions, n in all, each [.., heads, T-1, size].
    """

    layer: int
    difference: Tensor
    leaf: Tensor
    state: Tensor
    prefix: dict[int, list[tuple[Tensor, Tensor]]]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for pairs in self.prefix.values() for pair in pairs for tensor in pair)


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
) -> tuple[Tensor, _Moved]:
    """Run `layer` on the prompt's own hidden states [1, T, hidden], and its moved outputs through all later layers.

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
    prefix = _prefixes(arch, prompt, layer + 1, output[1:, 0].detach())
    return output[0].detach(), _Moved(layer, state=output[1:, 0, -1:], prefix=prefix, **made)


@torch.no_grad()
def _prefixes(
    arch: Architecture, prompt: Prompt, first: int, prompts: Tensor
) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """Keys and values of all positions but the last, layer by layer, of `prompts` [n, T, hidden] entering `first`."""
    prefixes: dict[int, list] = {layer: [] for layer in range(first, len(arch.layers))}
    tokens = TOKENS_TOGETHER.get(prompts.device.type, MANY_TOKENS)
    for x in prompts.split(max(1, tokens // prompts.shape[1])):
        cache = Collector(last=arch.last)
        for layer, pairs in prefixes.items():
            x = _call(arch, prompt, layer, x, cache)
            keys, values = cache.kept[layer]
            pairs.append((keys[:, :, :-1], values[:, :, :-1]))
    return prefixes


def _call(arch: Architecture, prompt: Prompt, layer: int, hidden: Tensor, cache: Collector) -> Tensor | None:
    """One decoder layer, called as the prompt's pass called it, with another cache; None where that stopped it."""
    kwargs = {name: cache if isinstance(value, Collector) else value for name, value in prompt.calls[layer].items()}
    try:
        return hidden_of(arch.layers[layer](hidden, **kwargs))
    except Stop:
        return None


def _walk(
    arch: Architecture, prompt: Prompt, moved: list[_Moved], ends: range, totals: dict, target: Tensor | None
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

    layers = []
    for number, own in enumerate(prompt.prefix):
        pairs = [own, *(pair for group in moved for pair in group.prefix.pop(number, ()))]
        layers.append(PrefixLayer(*(torch.cat(tensors) for tensors in zip(*pairs, strict=True))))
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
