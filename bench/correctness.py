"""The check before every timing: the fused computation's error is at most about twice eager PyTorch's.

Errors are norm-wise, relative, and against float64: ||actual - truth|| / ||truth||.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gci_kernels import ops
from gci_kernels.accuracy import error_bound, relative_error

from .baselines import collect_grads
from .cases import HEADS, BottleneckInputs, LayerInputs, LayerVariant, RowInputs, change_adapters, mixing

Errors = dict[str, dict[str, float]]  # tensor -> {"eager": error, "gci": error, "bound": largest error allowed}


class CorrectnessError(AssertionError):
    """A computation's error is larger than its working dtype explains, so that its times mean nothing."""


def check_layer(inputs: LayerInputs, variants: dict[str, LayerVariant]) -> Errors:
    """Compares y and every gradient of the variants "eager" and "gci" with the layer's formula in float64.

    The bound for gci is twice eager's error, plus rounding. At least half of eager's digits must be right, as a wrong
    baseline would make that bound meaningless.

    Raises:
        CorrectnessError: an error is larger than its bound.
    """
    truth = _layer_truth(inputs)
    eager, gci = (_errors(variants[name].results(), truth) for name in ("eager", "gci"))
    dtype = inputs.x.dtype
    for name, error in eager.items():
        _require("eager", name, error, math.sqrt(torch.finfo(dtype).eps), "half the digits of its dtype")
    return _judge(
        {name: {"eager": eager[name], "gci": gci[name], "bound": error_bound(eager[name], dtype)} for name in truth}
    )


def check_model(
    variants: dict[str, nn.Module], ids: Tensor, *, left: Callable[[], float] = lambda: math.inf,
    advance: Callable[[int, int], None] = lambda done, of: None,
) -> Errors:  # fmt: skip
    """Compares each token's loss and every adapter gradient of the variants "eager" and "gci" with a float64 model.

    The error of a gradient that has passed many layers is partly random: real models have tokens whose activations are
    a thousand times the others', and one of these numbers can decide the error of a whole tensor. Therefore a tensor's
    bound is twice eager's error for it or twice eager's median error over all gradients, whichever is larger, plus
    rounding; and every sequence is a trial of its own, of which a tensor's median one counts. A step with other adapter
    values is made before, as in training, so that values kept from an earlier step show as errors.

    When the time is used up and all tensors have passed so far, the remaining trials are left out: too little time
    weakens the check and does not fail it.

    Args:
        variants: two models with the same adapter values around the same base weights; `check_layer` vouches for the
            layers that the float64 model, a copy of the eager one, is made of.
        ids: [trials, seq] int64, the tokens to predict.
        left: the seconds that are left.
        advance: called after every trial with the number made and how many there will be.

    Returns:
        For each tensor the errors of its median trial.

    Raises:
        CorrectnessError: an error is larger than its bound.
    """
    exact = copy.deepcopy(variants["eager"]).double()
    for name in ("eager", "gci"):
        change_adapters(variants[name])
        _loss_and_grads(variants[name], ids[:1])
        change_adapters(variants[name])
    trials: list[Errors] = []
    while len(trials) < len(ids):
        begun = time.perf_counter()
        trials.append(_trial(exact, variants, ids[len(trials)].unsqueeze(0)))
        passed = all(error["gci"] <= error["bound"] < math.inf for trial in trials for error in trial.values())
        enough = passed and left() < time.perf_counter() - begun
        advance(len(trials), len(trials) if enough else len(ids))
        if enough:
            break
    return _judge({name: _median_trial([trial[name] for trial in trials]) for name in trials[0]})


def _median_trial(errors: list[dict[str, float]]) -> dict[str, float]:
    """The trial whose error relative to its bound is the median; of an even number the upper median."""
    return sorted(errors, key=lambda error: error["gci"] / error["bound"])[len(errors) // 2]


def _trial(exact: nn.Module, variants: dict[str, nn.Module], ids: Tensor) -> Errors:
    truth = _loss_and_grads(exact, ids)
    eager, gci = (_errors(_loss_and_grads(variants[name], ids), truth) for name in ("eager", "gci"))
    dtype = next(variants["eager"].parameters()).dtype
    typical = statistics.median(error for name, error in eager.items() if name != "loss")
    bounds = {
        name: error_bound(error if name == "loss" else max(error, typical), dtype) for name, error in eager.items()
    }
    return {name: {"eager": eager[name], "gci": gci[name], "bound": bounds[name]} for name in truth}


def _errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    if results.keys() != truth.keys():
        raise CorrectnessError(f"these results have no counterpart: {sorted(results.keys() ^ truth.keys())}")
    return {name: relative_error(value, truth[name]) for name, value in results.items()}


def _judge(errors: Errors) -> Errors:
    for name, error in errors.items():
        _require("eager", name, error["eager"], math.inf, "it is not finite")
        _require("gci_kernels", name, error["gci"], error["bound"], f"eager PyTorch has {error['eager']:.2e}")
    return errors


def _require(variant: str, name: str, error: float, bound: float, why: str) -> None:
    if math.isinf(error) or error > bound:  # relative_error makes an infinite error of NaN
        raise CorrectnessError(
            f"{variant}: {name} differs from float64 by {error:.2e} (relative), more than {bound:.2e} ({why})"
        )


def _layer_truth(inputs: LayerInputs) -> dict[str, Tensor]:
    """The layer by its formula in float64: y and every gradient."""
    y, leaves = _rows_truth(inputs) if isinstance(inputs, RowInputs) else _bottleneck_truth(inputs)
    grads = torch.autograd.grad(y, list(leaves.values()), inputs.dy.double())
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def _rows_truth(inputs: RowInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """y and the leaves by name."""
    leaves = {"x": _leaf(inputs.x), "active": _leaf(inputs.active)}
    weight = inputs.weight.double().index_copy(0, inputs.positions, leaves["active"])
    return leaves["x"] @ weight.T, leaves


def _bottleneck_truth(inputs: BottleneckInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """y and its leaves; of a method that others have registered by its formula, of LoRA as one expert with gate 1."""
    leaves = {name: _leaf(tensor) for name, tensor in {"x": inputs.x, "A": inputs.A, "B": inputs.B}.items()}
    weights = {name: _leaf(tensor) for name, tensor in inputs.weights.items()}
    x, A, B = leaves.values()
    base, leaves, h = x @ inputs.weight.double().T, leaves | weights, x @ A.T
    if inputs.method == "loramoe":
        gates = torch.softmax(x @ weights["router"].T, dim=-1)
        h = (gates.unsqueeze(-1) * h.unflatten(-1, (gates.shape[-1], -1))).flatten(-2)
    elif inputs.method == "alora":
        h = _attention(*(h @ weights["qkv"].T).chunk(3, -1))
    elif inputs.method != "lora":
        how = mixing(inputs.method)
        update, _ = ops.bottleneck_linear(
            x, None, None, A, B, *weights.values(), scaling=inputs.scaling, impl="reference", **how
        )
        return base + update, leaves
    return base + inputs.scaling * h @ B.T, leaves


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, one head after another: q, k, v and the result [tokens, r]."""
    visible = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).tril()
    heads = []
    for query, key, value in zip(q.chunk(HEADS, -1), k.chunk(HEADS, -1), v.chunk(HEADS, -1), strict=True):
        scores = (query @ key.T / math.sqrt(query.shape[-1])).masked_fill(~visible, -math.inf)
        heads.append(scores.softmax(-1) @ value)
    return torch.cat(heads, -1)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64, copy=True).requires_grad_()


def _loss_and_grads(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The loss of every predicted token, as their mean alone could be right by chance, and the adapters' gradients."""
    for parameter in model.parameters():
        parameter.grad = None
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    losses.mean().backward()
    return {"loss": losses.detach(), **collect_grads(model)}
