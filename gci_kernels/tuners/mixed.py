"""Batches in which every sequence has an adapter of its own: PEFT's `adapter_names`.

The names hold for one thread, and for the layers of one model: requests in several threads keep to their own.
"""

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from gci_kernels.models import decoder_layers
from gci_kernels.ops import transforms
from gci_kernels.ops.decode import Group
from gci_kernels.tuners import fusion

#: PEFT's name for no adapter at all.
BASE = "__base__"
# step(x, weight, bias, y, tokens): as FusedLayer._step, for the adapters of all tokens at once.
MixedStep = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, "Tokens"], Tensor | None]

_TEXT_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
# What configs call the token that stands for a part of an image, a video or a sound.
_PLACEHOLDER = re.compile(r"^(image|video|audio|speech)_token_(id|index)$")


class MixedBatch:
    """The adapters of a mixed batch, and which rows of a layer's input belong to which of them.

    Attributes:
        names: one for each input of the call.
        layers: by the id of each adapted module: "expert" for one expert of a mixture, "tower" for a layer outside of
            the text model (a vision tower's), None for all others.
        repeats: how many rows generate() may make of each input.
        shape: batch size, and lengths of the sequences, of the model's current forward; None before the first.
        equal_media: whether every row of that forward has as much of images or sounds as the others; None: it has none,
            as far as is known.
    """

    def __init__(self, names: Sequence[str], repeats: frozenset[int] = frozenset((1,))) -> None:
        self.names, self.repeats = list(names), repeats
        self.layers: dict[int, str | None] = {}
        self.shape: tuple[int, set[int]] | None = None
        self.equal_media: bool | None = None
        self._expanded: dict[int, list[str]] = {len(self.names): self.names}

    def fits(self, x: Tensor, layer: nn.Module) -> bool:
        """Whether the rows of x [..., in] are known to be those of the inputs in order, equally many for each."""
        count, rows, kind = len(self.names), x.shape[0], self.layers.get(id(layer))
        if not count or (kind == "expert" and x.dim() == 2) or (kind == "tower" and self.equal_media is False):
            return False
        if self.shape is None:
            return rows == count
        batch, lengths = self.shape
        if batch % count or batch // count not in self.repeats:
            return False
        if rows == batch or (x.dim() == 2 and any(rows == batch * length for length in lengths)):
            return True
        return kind == "tower" and self.equal_media is True and rows % batch == 0

    def check(self, x: Tensor, layer: nn.Module) -> None:
        """ValueError unless x [..., in] :meth:`fits`."""
        if self.fits(x, layer):
            return
        if self.layers.get(id(layer)) == "expert":
            raise ValueError(
                "adapter_names: a layer of one expert of a mixture gets tokens in the order of the router, so it is "
                "unknown whose they are; leave the experts out of target_modules, or run each adapter by itself"
            )
        if self.layers.get(id(layer)) == "tower" and self.equal_media is False:
            raise ValueError(
                "adapter_names: the inputs have different numbers of images or sounds, so it is not known whose rows a "
                "layer of their tower sees; leave the tower out by exclude_modules, or run each adapter by itself"
            )
        message = f"adapter_names must name an adapter for each of the {x.shape[0]} inputs, got {len(self.names)}"
        if self.shape is not None and self.shape[0] != x.shape[0]:
            message += (
                f"; in a forward of batch {self.shape[0]} it is not known which inputs {list(x.shape)} of a layer are "
                "whose"
            )
        raise ValueError(message)

    def expanded(self, rows: int) -> list[str]:
        """The names for `rows` rows, equally many for each input."""
        if rows not in self._expanded:
            self._expanded[rows] = [name for name in self.names for _ in range(rows // len(self.names))]
        return self._expanded[rows]

    def read_forward(self, model: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        """Forward pre-hook of the model: reads the shape of its batch.

        Without kwargs another thread is just registering or removing the hook.
        """
        if thread.state.batch is not self or kwargs is None:
            return
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() > 1]
        named = (kwargs.get(name) for name in _TEXT_INPUTS)
        texts = [t for t in named if isinstance(t, Tensor) and t.dim() > 1] or tensors
        self.shape = (texts[0].shape[0], {t.shape[1] for t in texts}) if texts else None
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        self.equal_media = _has_equal_media(model, ids)

    def pass_names(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        """Forward pre-hook of a module that takes adapter_names as an argument; kwargs as in :meth:`read_forward`."""
        if thread.state.batch is not self or kwargs is None:
            return None
        names = self.names
        if args and isinstance(args[0], Tensor) and self.fits(args[0], module):
            names = self.expanded(args[0].shape[0])
        return args, kwargs | {"adapter_names": names}


class _State:
    """The mixed batch of one thread."""

    def __init__(self) -> None:
        self.batch: MixedBatch | None = None


class _Thread(threading.local):
    """One state for each thread; torch.compile follows what is set on the state, but not on a threading.local."""

    def __init__(self) -> None:
        self.state = _State()


thread = _Thread()  # every layer looks here in every call; where a batch is set, it asks :func:`current`


def current(layer: nn.Module) -> MixedBatch | None:
    """The mixed batch that `layer` is called in; None in the ordinary case."""
    batch = thread.state.batch
    return batch if batch is not None and id(layer) in batch.layers else None


def _has_equal_media(model: nn.Module, ids: Any) -> bool | None:
    """Whether all rows of input_ids have equally many tokens that stand for images or sounds; None: there are none."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2 or ids.shape[1] == 1:
        return None
    settings = vars(model.config) if hasattr(model, "config") else {}
    placeholders = {value for name, value in settings.items() if _PLACEHOLDER.match(name) and isinstance(value, int)}
    if not placeholders:
        return None
    counts = torch.stack([(ids == value).sum(1) for value in placeholders])
    low, high = torch.stack((counts.amin(1), counts.amax(1))).tolist()  # waits for a GPU, once a prompt
    return None if not any(high) else low == high


class Tokens:
    """Which tokens of x [batch, ..., in], viewed as [tokens, in], have which adapter.

    Attributes:
        samples: an adapter's rows of the batch, by its name; adapters that the layer does not have are left out.
        rows: the tokens in the order of their adapters, those without an adapter last.
        counts: how many tokens each adapter has.
        inputs: the number of names; x may have more rows, equally many for each.
    """

    def __init__(self, x: Tensor, names: Sequence[str], present: Container[str]) -> None:
        self.samples: dict[str, list[int]] = {}
        for sample, name in enumerate(names):
            if name in present:
                self.samples.setdefault(name, []).append(sample)
        self.inputs = len(names)
        each = x.numel() // x.shape[-1] // len(names)
        without = [sample for sample, name in enumerate(names) if name not in self.samples]
        order = [*(sample for samples in self.samples.values() for sample in samples), *without]
        self.rows = tuple(sample * each + t for sample in order for t in range(each))
        self.counts = {name: len(samples) * each for name, samples in self.samples.items()}

    def groups(self, group: Callable[[str, int, int], Group | None]) -> tuple[Group, ...] | None:
        """One for each adapter; None where a decoding step cannot compute one of them.

        Args:
            group: makes it from the adapter's name, how many tokens it has, and the first of them.
        """
        groups, first = [], 0
        for name, count in self.counts.items():
            if (made := group(name, count, first)) is None:
                return None
            groups.append(made)
            first += count
        return tuple(groups)


def indices(samples: tuple[int, ...], device: torch.device) -> Tensor:
    """[samples] int64 on `device`, cached: copying them to a GPU in each call would wait for it."""
    # What is made while operations are recorded, or under FakeTensorMode, belongs to what records them.
    recorded = transforms.transformed() or (not torch.compiler.is_compiling() and transforms.dispatch_mode_depth() > 0)
    return torch.tensor(samples, device=device) if recorded else _cached_indices(samples, device)


@functools.lru_cache(maxsize=256)
def _cached_indices(samples: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a later call may need them for its gradients
        return torch.tensor(samples, device=device)


def combine(
    base: nn.Module, x: Tensor, tokens: Tokens, add: Callable[[Tensor, Tensor, str, Tensor], Tensor],
    step: MixedStep | None,
) -> Tensor:  # fmt: skip
    """base(x) [batch, ..., out] with the update of each sequence's own adapter.

    Args:
        x: [batch, ..., in].
        add: of y and x, both [inputs, tokens of each, features], an adapter's name and its inputs, int64 on x's device,
            returns y with its update.
        step: takes all of a decoding step at once where a kernel can; None where it is none.
    """
    y: Tensor | None = None
    if step is not None and tokens.samples:
        weight, bias, y = fusion.base_operands(base, x)
        if y is None or y.dtype == x.dtype:
            # What the base layer returned may have been kept by others, so a step writes into a copy.
            own = None if y is None else y.clone(memory_format=torch.contiguous_format)
            if (updated := step(x, weight, bias, own, tokens)) is not None:
                return updated
    y = fusion.product(base, x) if y is None else y
    shape, rows = y.shape, x.reshape(tokens.inputs, -1, x.shape[-1])
    for name, samples in tokens.samples.items():
        y = add(y.reshape(tokens.inputs, -1, shape[-1]), rows, name, indices(tuple(samples), x.device))
    return y.reshape(shape)


def checked_names(model: nn.Module, names: object, known: set[str]) -> list[str]:
    """`names`, the adapter_names of a call, as a list.

    Args:
        known: the names of the model's adapters.

    Raises:
        TypeError: they are no list of strings.
        ValueError: the model is in training, there are none, or one is no adapter's.
    """
    if model.training:
        raise ValueError("adapter_names: mixed batches are for inference; call model.eval() first")
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names must be a list of strings, got {type(names).__name__}: {names!r}")
    if not names:
        raise ValueError("adapter_names must name an adapter for each of the inputs, got an empty list")
    unknown = set(names) - known - {BASE}
    if unknown:
        raise ValueError(
            f"adapter_names: there is no adapter {sorted(unknown)}; there are {sorted(known)} and {BASE!r}"
        )
    return list(names)


@contextlib.contextmanager
def enabled(
    tuner: Any, names: list[str], args: tuple, kwargs: dict[str, Any], adapted: tuple[type[nn.Module], ...],
    with_names: tuple[type[nn.Module], ...],
) -> Iterator[None]:  # fmt: skip
    """While this context is active, calls of the tuner's model in this thread are mixed batches.

    Args:
        args, kwargs: of the forward or generate() that begins.
        adapted: the types of layers that ask :func:`current`.
        with_names: types of other modules, which take the names as an argument.
    """
    model, batch = tuner.model, MixedBatch(names, _repeats(tuner.model, args, kwargs))
    text = model.get_decoder() if hasattr(model, "get_decoder") else None
    in_text = set() if text is None or text is model else {id(module) for module in text.modules()}
    handles = [model.register_forward_pre_hook(batch.read_forward, with_kwargs=True)]
    for name, module in tuner.named_modules():
        if isinstance(module, adapted):
            # Heads are children of the model itself.
            outside = bool(in_text) and id(module) not in in_text and name.count(".") > 1
            batch.layers[id(module)] = "expert" if decoder_layers.EXPERT.search(name) else "tower" if outside else None
        elif isinstance(module, with_names):
            handles.append(module.register_forward_pre_hook(batch.pass_names, with_kwargs=True))
    state = thread.state
    before, state.batch = state.batch, batch
    batch.read_forward(model, args, kwargs)  # generate() may run a tower before it calls the model
    try:
        yield
    finally:
        state.batch = before
        for handle in handles:
            handle.remove()


def _repeats(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> frozenset[int]:
    """How many rows generate() may make of each input, by all that it looks at; a forward makes one."""
    candidates = [*args, kwargs.get("generation_config"), getattr(model, "generation_config", None)]
    configs = [config for config in candidates if isinstance(config, GenerationConfig)]

    def requested(name: str) -> set[int]:
        values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return {1, *(value for value in values if isinstance(value, int))}

    return frozenset(
        max(beams, sequences) for beams in requested("num_beams") for sequences in requested("num_return_sequences")
    )
