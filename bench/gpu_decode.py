"""Decoding of a few Llama layers with random weights: one token of some sequences on a static cache, in bfloat16.

Each variant runs by plain calls and as a CUDA graph, captured once and replayed; then compiled by torch. It is timed
only after two checks: our logits and eager's against float64, and each graph's against plain calls of its model.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from gci_kernels.accuracy import error_bound, relative_error
from gci_kernels.generation import sequence
from gci_kernels.ops.decode import choose_decode

from .baselines import adapter_leaves
from .cases import HEADS, ranks
from .correctness import CorrectnessError
from .gpu_stages import Measurement
from .models import random_llama
from .timing import Timing, interleave
from .variants import model_variants, random_ids

#: The least share of the frozen base's tokens a second that is asked for under CUDA graphs.
REQUIRED = {"lora": 0.95, "loramoe": 0.95, "alora": 0.90}
BATCHES = (1, 8, 16)
CHECKED = 4  # steps whose logits a check compares, at every length
SHORT = 3  # tokens: at this length one token too many or too few changes the logits clearly
NO_GRAPHS = "CUDA graphs need a GPU"
NO_EAGER_GRAPH = "the length of eager ALoRA's past changes at every step, which no CUDA graph can follow"


@dataclass(frozen=True)
class Sizes:
    """What is measured; `steps` are timed together."""

    llama: dict[str, int]
    past: dict[str, int]  # tokens in the cache, by method
    compiled: tuple[str, ...]  # methods
    steps: int
    rounds: int
    compiler: str


def reasons(device: torch.device) -> dict[str, str]:
    """Why variants cannot run on `device`; to leave one out for such a reason is no failure."""
    return {"graph": NO_GRAPHS} if device.type != "cuda" else {"eager graph": NO_EAGER_GRAPH}


class Decoding:
    """A model with a static cache of its own; `step` is one token of each sequence.

    A step's inputs (the token and its position) and the cache stay at the same addresses, as a CUDA graph needs.
    """

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.run: Callable[..., Any] = model  # the model, or what it was compiled to
        self.forward: Callable[[], Tensor] = self._call
        config: Any = model.config
        self.cache = StaticCache(config=config, max_cache_len=ids.shape[1])
        self.token, self.position = ids[:, :1].clone(), torch.zeros_like(ids[:, :1])
        self.at = 0
        self.fill(SHORT)

    def fill(self, tokens: int) -> None:
        """Empty the cache and run the first `tokens` of each sequence."""
        self.cache.reset()
        with torch.no_grad():
            self.model(self.ids[:, :tokens], past_key_values=self.cache, logits_to_keep=1)
        self.at = tokens

    def step(self) -> Tensor:
        """The logits of the next token, [batch, 1, vocabulary]; the next step may write over them."""
        self.token.copy_(self.ids[:, self.at : self.at + 1])
        self.position.fill_(self.at)
        self.at += 1
        with torch.no_grad():
            return self.forward()

    def steps(self, number: int) -> None:
        """Run so many steps."""
        for _ in range(number):
            self.step()

    def _call(self) -> Tensor:
        """The logits of the token that `step` has set, [batch, 1, vocabulary]."""
        return self.run(self.token, past_key_values=self.cache, position_ids=self.position).logits

    def logits(self, tokens: int) -> Tensor:
        """[batch, CHECKED, vocabulary] of the steps after `tokens` tokens."""
        self.fill(tokens)
        return torch.cat([self.step().clone() for _ in range(CHECKED)], 1)

    def capture(self) -> "Decoding":
        """Capture a step as a CUDA graph, which every later step replays at any length; the decoding itself."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            logits = self.forward()

        def replay() -> Tensor:
            graph.replay()
            return logits

        self.forward = replay
        return self

    def compile(self, compiler: str) -> "Decoding":
        """Compile the model by torch.compile's backend of that name; the decoding itself."""
        mode = "reduce-overhead" if compiler == "inductor" else None
        self.run = torch.compile(self.model, backend=compiler, mode=mode)
        return self


def decode(sizes: Sizes, device: torch.device) -> Iterator[Measurement]:
    """All cases, one sequence first. Compiling comes last: it may take all the time that is left."""
    cases = [(method, batch, False) for batch in BATCHES for method in REQUIRED]
    for method, batch, compiled in [*cases, *((method, BATCHES[0], True) for method in sizes.compiled)]:
        name = f"{method}, batch {batch}, {sizes.past[method]} past{', compiled' if compiled else ''}"
        yield name, partial(_measure, method, batch, compiled, sizes, device)


def _measure(method: str, batch: int, compiled: bool, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    models = model_variants(random_llama(sizes.llama, torch.bfloat16, device), method)
    for model in models.values():
        model.eval()
    if method == "alora":
        sequence.attach(models["eager"])  # it needs the past's length, which is then counted on the CPU
    past = sizes.past[method]
    ids = random_ids(models["frozen"], batch, past + CHECKED + sizes.steps * (sizes.rounds + 3))
    made, errors, left_out = {}, _check(models, ids, past), {}
    for name, make in _variants(models, ids, method, compiled, sizes.compiler, device).items():
        try:
            made[name] = make()
            _check_same(Decoding(models[name.split()[0]], ids), made[name], past, 4 if compiled else 1)
        except Exception as error:  # this variant is reported as left out, and the others are timed
            made.pop(name, None)
            known = reasons(device).values()
            left_out[name] = str(error) if str(error) in known else f"{type(error).__name__}: {error}"
    steps = {name: partial(decoding.steps, sizes.steps) for name, decoding in made.items()}
    seconds = interleave(steps, device=device, rounds=sizes.rounds, warmup=2)
    return {
        "method": method, "batch": batch, "past": past, "required": REQUIRED[method],
        "plan": _plan(method, batch, device),
        "adapted_layers": sum(bool(adapter_leaves(layer)) for layer in models["gci"].modules()),
        "kernels": {name: _launched(decoding, device) for name, decoding in made.items() if name in models},
        "errors": errors, "left_out": left_out, **_compare(seconds, batch * sizes.steps),
    }  # fmt: skip


def _variants(
    models: dict[str, nn.Module], ids: Tensor, method: str, compiled: bool, compiler: str, device: torch.device
) -> dict[str, Callable[[], Decoding]]:
    """name -> how it is made; the second word of a name says how it runs."""

    def graph(name: str) -> Decoding:
        if device.type != "cuda":
            raise RuntimeError(NO_GRAPHS)
        if (name, method) == ("eager", "alora"):
            raise RuntimeError(NO_EAGER_GRAPH)
        return Decoding(models[name], ids).capture()

    if compiled:
        return {
            f"{name} compiled": lambda name=name: Decoding(models[name], ids).compile(compiler)
            for name in ("frozen", "gci")
        }
    made: dict[str, Callable[[], Decoding]] = {name: partial(Decoding, model, ids) for name, model in models.items()}
    return made | {f"{name} graph": partial(graph, name) for name in models}


def _plan(method: str, batch: int, device: torch.device) -> str:
    """What one adapted layer launches in a step."""
    rank, experts = ranks(method)
    columns = rank * experts + (experts if method == "loramoe" else 0)
    chosen = choose_decode(
        tokens=batch, columns=columns, experts=experts if method == "loramoe" else 0, dtype=torch.bfloat16,
        adapter_dtype=torch.bfloat16, device_type=device.type, head=rank // HEADS if method == "alora" else None,
    )  # fmt: skip
    return str(chosen)


def _launched(decoding: Decoding, device: torch.device) -> int | None:
    """How many kernels and copies one step starts on the GPU; None on a CPU, and where the profiler sees none."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        decoding.step()
        torch.cuda.synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()) or None


def _compare(seconds: dict[str, Timing], tokens: int) -> dict[str, Any]:
    """Rates, and their shares of the frozen base's that runs in the same way, round by round."""
    shares = {}
    for name, timing in seconds.items():
        frozen = " ".join(("frozen", *name.split()[1:]))
        if name != frozen and frozen in seconds:
            shares[name] = asdict(seconds[frozen] / timing)
    return {
        "seconds": {name: asdict(timing) for name, timing in seconds.items()},
        "tokens_per_second": {name: asdict(timing.rate(tokens)) for name, timing in seconds.items()},
        "share": shares,
    }


# The checks


def _check(models: dict[str, nn.Module], ids: Tensor, past: int) -> dict[str, dict[str, float]]:
    """Errors of the steps' logits against float64 by length; CorrectnessError where ours exceed twice eager's."""
    exact, errors = copy.deepcopy(models["eager"]).double(), {}
    for length in (SHORT, past):
        # One sequence at a time: float64 scores of a whole batch need too much memory.
        truth = torch.cat([Decoding(exact, row.unsqueeze(0)).logits(length) for row in ids])
        eager, gci = (relative_error(Decoding(models[name], ids).logits(length), truth) for name in ("eager", "gci"))
        bound = error_bound(eager, torch.bfloat16)
        errors[str(length)] = {"eager": eager, "gci": gci, "bound": bound}
        if not (gci <= bound and eager <= torch.finfo(torch.bfloat16).eps ** 0.5):
            raise CorrectnessError(
                f"after {length} tokens logits differ from float64 by {gci:.2e}, eager PyTorch's by {eager:.2e}"
            )
    return errors


def _check_same(plain: Decoding, other: Decoding, past: int, roundings: int) -> None:
    """CorrectnessError where another way to run the same steps differs by more than so many roundings of bfloat16.

    Compared at two lengths and at the first one again, so that a graph has to follow the cache; both end at `past`.
    """
    for length in (past, SHORT, past):
        error = relative_error(other.logits(length), plain.logits(length))
        if not error <= roundings * torch.finfo(torch.bfloat16).eps:
            raise CorrectnessError(f"after {length} tokens it differs from plain calls by {error:.2e}")
