"""Batches in which every sequence has an adapter of its own: PEFT's `adapter_names`."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from gci_kernels.ops.decode import Group
from gci_kernels.ops.transforms import transformed
from gci_kernels.tuners import fusion

#: PEFT's name for no adapter at all.
BASE = "__base__"
# step(x, weight, bias, y, tokens): as fusion.Step, for the adapters of all tokens at once.
MixedStep = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, "Tokens"], Tensor | None]


class Tokens:
    """Which tokens of x [batch, ..., in], seen as [tokens, in], have which adapter.

    Attributes:
        samples: an adapter's rows of the batch, by its name; adapters that the layer lacks are left out.
        rows: the tokens, those of each adapter in turn, and behind them those of none.
        counts: how many tokens each adapter has.
    """

    def __init__(self, x: Tensor, names: Sequence[str], present) -> None:
        self.samples: dict[str, list[int]] = {}
        for sample, name in enumerate(names):
            if name in present:
                self.samples.setdefault(name, []).append(sample)
        each = x.numel() // x.shape[-1] // len(names)
        alone = [sample for sample, name in enumerate(names) if name not in self.samples]
        order = [*(sample for samples in self.samples.values() for sample in samples), *alone]
        self.rows = tuple(sample * each + t for sample in order for t in range(each))
        self.counts = {name: len(samples) * each for name, samples in self.samples.items()}

    def groups(self, group: Callable[[str, int, int], Group]) -> tuple[Group, ...]:
        """One for each adapter; `group` makes it from its name, how many tokens it has, and the first of them."""
        made, first = [], 0
        for name, count in self.counts.items():
            made.append(group(name, count, first))
            first += count
        return tuple(made)


def indices(samples: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 on `device`, made once: to bring them there a GPU would be waited for."""
    # What is made while operations are recorded, or under FakeTensorMode, belongs to what records them.
    own = transformed() or (not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack())
    return torch.tensor(samples, device=device) if own else _kept_indices(samples, device)


@functools.lru_cache(maxsize=256)
def _kept_indices(samples: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a later call may need them for its gradients
        return torch.tensor(samples, device=device)


def check(x: Tensor, names: Sequence[str]) -> None:
    """That x has one row for each name."""
    if x.shape[0] != len(names):
        raise ValueError(f"adapter_names must name an adapter for each of the {x.shape[0]} inputs, got {len(names)}")


def combine(
    base: nn.Module, x: Tensor, tokens: Tokens, add: Callable[[Tensor, Tensor, str, Tensor], Tensor],
    step: MixedStep | None,
) -> Tensor:  # fmt: skip
    """base(x) with what each sequence's own adapter makes of it.

    Args:
        add: of y, x, an adapter's name and its rows of the batch, int64 on x's device, returns y with its update.
        step: takes all of a decoding step at once where a kernel can; None where it is none.
    """
    plain, y = fusion.obstacle(base) is None, None
    if step is not None and tokens.samples:
        weight, bias = fusion.operands(base) if plain else (None, None)
        y = None if plain else base(x)
        if plain or y.dtype == x.dtype:
            own = None if plain else y.clone(memory_format=torch.contiguous_format)
            if (made := step(x, weight, bias, own, tokens)) is not None:
                return made
    y = base(x) if y is None else y
    for name, samples in tokens.samples.items():
        y = add(y, x, name, indices(tuple(samples), x.device))
    return y


def checked_names(model: nn.Module, names: object, num_beams: object, known: set[str]) -> list[str]:
    """The adapter of each row that the layers will see; generate repeats every input for its beams."""
    if model.training:
        raise ValueError("adapter_names: mixed batches are for inference; call model.eval() first")
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names must be a list of strings, got {type(names).__name__}: {names!r}")
    unknown = set(names) - known - {BASE}
    if unknown:
        raise ValueError(
            f"adapter_names: there is no adapter {sorted(unknown)}; there are {sorted(known)} and {BASE!r}"
        )
    beams = num_beams if isinstance(num_beams, int) else 1
    return [name for name in names for _ in range(beams)]


@contextlib.contextmanager
def given(modules: Iterator[nn.Module], names: list[str], kind: type[nn.Module]) -> Iterator[None]:
    """Meanwhile every module of `kind`, and those that PEFT saves beside adapters, are called with `names`."""

    def give(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"adapter_names": names}

    handles = [
        module.register_forward_pre_hook(give, with_kwargs=True)
        for module in modules
        if isinstance(module, (kind, AuxiliaryTrainingWrapper))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
