"""Keys and values of an adapter's own attention, stored beside the model's key-value cache in generation."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gci_kernels.ops.transforms import transformed

KVSpec = tuple[int, int, torch.dtype, torch.device]  # of an adapter's keys and values: batch size, width, dtype, device


class _Entry:
    """Past tokens of one adapter of one layer: a buffer [batch, capacity, width], filled up to `length`."""

    def __init__(self, batch: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.kv = torch.empty(batch, 0, width, dtype=dtype, device=device)
        self.length: int | None = 0  # None: as long as the model's cache, whose length only the device knows
        self.exclusive = False  # whether no other tensor shares the buffer, so that its unfilled part may be written
        self.with_gradients = False  # whether some of it was computed while gradients were recorded

    def append(self, kv: Tensor, past: int, max_length: int) -> None:
        """Stores kv [batch, time, width] behind the first `past` tokens; a new buffer has at least `max_length`."""
        total = past + kv.shape[1]
        if torch.is_grad_enabled() or transformed():
            # Autograd may need any of these tensors, so none is written in place; nor can torch.func's transforms.
            self.kv = torch.cat([self.kv[:, :past], kv], 1) if past else kv
            self.exclusive, self.with_gradients = False, torch.is_grad_enabled()
        else:
            self.reserve(past, total, max_length)[:, past:total] = kv
        self.length = total

    def reserve(self, past: int, total: int, max_length: int) -> Tensor:
        """The buffer, with a capacity of at least `total` tokens; those after the first `past` may be written."""
        # torch.compile cannot trace is_inference(); where that matters, torch raises.
        outside = not (is_dynamo_compiling() or torch.is_inference_mode_enabled())
        if total > self.kv.shape[1] or not self.exclusive or outside and self.kv.is_inference():
            old, capacity = self.kv, max(total, max_length, 2 * self.kv.shape[1] if past else 0)
            self.kv = old.new_empty(old.shape[0], capacity, old.shape[2])
            self.kv[:, :past] = old[:, :past].detach()
            self.exclusive = True
            if max_length and not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.kv)  # as transformers does: CUDA graphs may then write to it
        return self.kv


def _spec(kv: Tensor) -> KVSpec:
    return kv.shape[0], kv.shape[2], kv.dtype, kv.device


def _misfit(stored: KVSpec, new: KVSpec, layer_key: str, adapter: str) -> ValueError:
    pairs = zip(("batch size", "width", "dtype", "device"), stored, new, strict=True)
    name, has, given = next(each for each in pairs if each[1] != each[2])
    return ValueError(
        f"past_key_values does not fit adapter {adapter!r} of layer {layer_key!r}: its {name} is {has} there and "
        f"{given} here"
    )


class AdapterCache:
    """What all adapters store beside one model cache: keys and values, concatenated, under (layer, adapter).

    Without gradients they are written into buffers that double when full, or that have a static cache's whole length
    from the start. Where gradients are recorded nothing is written in place and tensors are concatenated; a past that
    was stored so is refused in training, for it would get no gradient. Nothing here waits for the device.

    Attributes:
        tokens: how many tokens the model's cache holds, counted here because the length of a static cache is a tensor,
            and reading it waits for the device. None: unknown here, after decoding steps that may be replayed as a
            graph without running this code; the cache's own length on the device is right.
        replayed: whether there have been such steps. From the first one on there may have been replays at any time,
            and `tokens` has to be read from the device before it is used.
        counting_layer: the number of the model's layer whose updates are counted. None where no layer of the cache
            knows how many tokens it has seen, as where all are state spaces: then every forward's tokens are counted.
        max_length: the capacity of a static cache in tokens, 0 for others.
        packed: segments of packed sequences that the cache holds, int32 [batch, tokens], or None.
    """

    def __init__(self, tokens: int, max_length: int, counting_layer: int | None = 0) -> None:
        self.tokens: int | None = tokens
        self.replayed = False
        self.counting_layer = counting_layer
        self.max_length = max_length
        self.packed: Tensor | None = None
        self._entries: dict[tuple[str, str], _Entry] = {}

    def add_tokens(self, count: int) -> None:
        """Counts `count` new tokens, unless the tokens are counted on the device."""
        if self.tokens is not None:
            self.tokens += count

    def begin_forward(self, time: int) -> None:
        """Counts the `time` tokens of a forward that begins, where no layer does; its past has been read."""
        if self.counting_layer is None:
            self.add_tokens(time)

    def stop_counting(self) -> None:
        """From here on the tokens are counted on the device alone."""
        self.tokens, self.replayed = None, True

    def resume_counting(self, tokens: int) -> int:
        """Sets the number of tokens, as read from the device, here and for all entries that missed none; returns it."""
        for entry in self._entries.values():
            if entry.length is None or entry.length == self.tokens:
                entry.length = tokens
        self.tokens = tokens
        return tokens

    def check(self, entries: Iterable[tuple[str, str]], past: int) -> None:
        """Checks that every (layer, adapter) in `entries` has exactly `past` tokens here.

        Raises:
            ValueError: one has not.
        """
        for layer_key, adapter in entries:
            entry = self._entries.get((layer_key, adapter))
            length = 0 if entry is None else entry.length
            if length != past:
                raise ValueError(
                    f"past_key_values holds {past} tokens, but {length} tokens of adapter {adapter!r} of layer "
                    f"{layer_key!r}: it was filled by another model, while the adapter was disabled or not active, or "
                    "by a compiled forward with gradients. Give a cache that this model filled with the same "
                    "adapters, or an empty one"
                )

    def past(self, layer_key: str, adapter: str, past: int, new: Tensor) -> Tensor | None:
        """What is stored of the `past` tokens before this forward, [batch, past, width]; None: nothing. Read-only.

        Args:
            layer_key, adapter, past: as in :meth:`keep`.
            new: [batch, any, width] in the dtype and on the device of what :meth:`keep` will be given.

        Raises:
            ValueError: what is stored does not fit, or was stored for a gradient that would be lost.
        """
        entry = self._entry(layer_key, adapter, past)
        if entry is None:
            return None
        if (stored := _spec(entry.kv)) != (given := _spec(new)):
            raise _misfit(stored, given, layer_key, adapter)
        if entry.with_gradients and torch.is_grad_enabled():
            raise ValueError(
                "past_key_values was filled while gradients were recorded, and none flow into what adapter "
                f"{adapter!r} keeps of past tokens: fill it under torch.no_grad(), or train on whole sequences"
            )
        return entry.kv[:, :past]

    def keep(self, layer_key: str, adapter: str, kv: Tensor, *, past: int) -> None:
        """Stores the new keys and values of one adapter of one layer.

        Args:
            layer_key: any name of the layer that is unique in the model.
            adapter: the adapter's name.
            kv: [batch, time, width] floating point, of the new tokens. Copied, except where gradients are recorded.
            past: the number of tokens in the model's cache before this forward.

        Raises:
            ValueError: what is stored has another length, batch size, width, dtype or device. Nothing is changed then.
        """
        if kv.dim() != 3:
            raise ValueError(f"kv must be [batch, time, width], got {list(kv.shape)}")
        self._entry_to_extend(layer_key, adapter, _spec(kv), past).append(kv, past, self.max_length)

    def reserve(self, layer_key: str, adapter: str, spec: KVSpec, *, past: int) -> Tensor:
        """For a kernel that writes one new token itself: a buffer [batch, capacity, width], filled up to `past`.

        The token counts as stored from now on. Not for use where gradients are recorded.

        Args:
            layer_key, adapter, past: as in :meth:`keep`.
            spec: of the new token.

        Raises:
            ValueError: as :meth:`keep`.
        """
        # Every layer calls this in every decoding step: an entry that has room is found without another Python call.
        entry = self._entries.get((layer_key, adapter))
        if entry is not None and entry.exclusive and entry.length == past < entry.kv.shape[1]:
            kv = entry.kv
            writable = is_dynamo_compiling() or torch.is_inference_mode_enabled() or not kv.is_inference()
            if writable and (kv.shape[0], kv.shape[2], kv.dtype, kv.device) == spec:
                entry.length = past + 1
                return kv
        entry = self._entry_to_extend(layer_key, adapter, spec, past)
        kv = entry.reserve(past, past + 1, self.max_length)
        entry.length = past + 1
        return kv

    def _entry(self, layer_key: str, adapter: str, past: int) -> _Entry | None:
        """The entry; it holds `past` tokens. None where there is none and `past` is 0."""
        entry = self._entries.get((layer_key, adapter))
        if entry is not None and entry.length is None:
            entry.length = past
        if (0 if entry is None else entry.length) != past:
            self.check(((layer_key, adapter),), past)
        return entry

    def _entry_to_extend(self, layer_key: str, adapter: str, spec: KVSpec, past: int) -> _Entry:
        """The entry, of `past` tokens like `spec`; a new one where there is none, or an empty one of another spec."""
        entry = self._entry(layer_key, adapter, past)
        if entry is not None and (stored := _spec(entry.kv)) != spec:
            if past:
                raise _misfit(stored, spec, layer_key, adapter)
            entry = None
        if entry is None:
            entry = self._entries[layer_key, adapter] = _Entry(*spec)
        return entry

    def static_dtype(self, entries: Iterable[tuple[str, str]]) -> torch.dtype | None:
        """The dtype of what :meth:`reserve_static` can give for all of `entries`; None where it cannot for some.

        It needs a buffer of the static cache's whole length, and no token may be missing there that the model's cache
        has. The latter is not looked at in torch.compile, which would compile again once the device counts.
        """
        found, tracing = [self._entries.get(key) for key in entries], torch.compiler.is_compiling()
        complete = [
            e is not None and e.exclusive and e.kv.shape[1] == self.max_length and (tracing or e.length == self.tokens)
            for e in found
        ]
        if not complete or not all(complete) or self.packed is not None or found[0] is None:
            return None
        return found[0].kv.dtype

    def reserve_static(self, layer_key: str, adapter: str, spec: KVSpec) -> Tensor:
        """As :meth:`reserve`, for a static cache whose length the kernel reads on the device when it runs."""
        entry = self._entries[layer_key, adapter]
        if (stored := _spec(entry.kv)) != spec:
            raise _misfit(stored, spec, layer_key, adapter)
        entry.length = None
        return entry.kv

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces every buffer [batch, capacity, width] by `change` of it."""
        for entry in self._entries.values():
            entry.kv = change(entry.kv)

    def crop(self, length: int) -> None:
        """Drops all but the first `length` tokens; buffers of a static cache keep their addresses."""
        for key, entry in list(self._entries.items()):
            entry.length = length if entry.length is None else min(entry.length, length)
            if entry.length:
                continue
            entry.with_gradients = False
            if not self.max_length:
                del self._entries[key]
