"""The sequences in a batch: which positions belong together, which are padding, and how many were cached before."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gci_kernels.ops.transforms import transformed


@dataclass(frozen=True, eq=False)
class Sequence:
    """The sequences in a batch. Each row holds `keys` positions, of which the last `keys - past` are queries.

    The classmethods check their tensors' values. On a CPU they read them, raise, and leave `segments` None if every row
    is one sequence without padding. On a GPU, where to read a value is to wait for all that was launched before, they
    keep `segments` and let the device check: a wrong value ends in CUDA's error of a device-side assertion, as an index
    that an embedding does not have, and CUDA prints the message. Under torch.jit.trace, torch.export, torch.func and
    forward-mode differentiation `segments` are kept too, unchecked: a traced graph has to work for other values.

    Attributes:
        segments: int32 [batch, keys], any device: the id of the packed sequence that a position belongs to, negative
            for padding. A position attends itself and the earlier positions of the same id. None: each row is one
            sequence.
        past: the number of keys before the first query.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, what was given and what is allowed.
    """

    segments: Tensor | None = None
    past: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.past, int):
            raise TypeError(f"past must be an integer, got {type(self.past).__name__}")
        if self.past < 0:
            raise ValueError(f"past must be at least 0, got {self.past}")
        if self.segments is None:
            return
        if not isinstance(self.segments, Tensor):
            raise TypeError(f"segments must be a tensor or None, got {type(self.segments).__name__}")
        if self.segments.dtype != torch.int32:
            raise TypeError(f"segments must be torch.int32, got {self.segments.dtype}")
        if self.segments.dim() != 2:
            raise ValueError(f"segments must be [batch, keys], got {list(self.segments.shape)}")
        if self.past > self.segments.shape[1]:
            raise ValueError(f"past must be at most keys={self.segments.shape[1]}, got {self.past}")

    def select(self, rows: Tensor) -> "Sequence":
        """The sequences of some batch rows; `rows`: int64 [any], on the device of segments."""
        return self if self.segments is None else Sequence(self.segments.index_select(0, rows), self.past)

    @classmethod
    def from_mask(cls, attention_mask: Tensor, past: int = 0) -> "Sequence":
        """One sequence a row, with padding anywhere.

        Args:
            attention_mask: [batch, keys], bool, integer or floating, any device: 1 for a position, 0 for padding.
            past: the number of keys before the first query.
        """
        return _make(_check_mask(attention_mask).int() - 1, past)

    @classmethod
    def from_position_ids(
        cls, position_ids: Tensor, past: int = 0, attention_mask: Tensor | None = None
    ) -> "Sequence":  # fmt: skip
        """Sequences packed into rows: a position that is not one more than the previous position starts a new one.

        Args:
            position_ids: [batch, keys], an integer dtype, any device; of all keys, past ones too.
            past: the number of keys before the first query.
            attention_mask: as in :meth:`from_mask`, or None. The position ids of padding are ignored; after padding
                inside a sequence the ids may go on from before it, or have counted the padding.
        """
        _check_matrix("position_ids", position_ids)
        if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
            raise TypeError(f"position_ids must have an integer dtype, got {position_ids.dtype}")
        if position_ids.shape[1] == 0:
            return _make(position_ids.int(), past)
        if attention_mask is None:
            starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
            return _make(torch.nn.functional.pad(starts, (1, 0)).cumsum(1, dtype=torch.int32), past)
        mask = _check_mask(attention_mask)
        if mask.shape != position_ids.shape:
            expected = list(position_ids.shape)
            raise ValueError(f"attention_mask must be {expected} like position_ids, got {list(mask.shape)}")
        column = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        last = torch.where(mask, column, -1).cummax(1).values.roll(1, 1)  # the column of the last token before this one
        last[:, 0] = -1
        last_id = position_ids.gather(1, last.clamp(min=0))
        continues = (position_ids == last_id + 1) | (position_ids == last_id + (column - last))
        starts = mask & ~continues & (last >= 0)
        return _make(torch.where(mask, starts.cumsum(1), -1).int(), past)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, tokens: int) -> "Sequence":
        """Sequences packed into one row.

        Args:
            cu_seqlens: [n + 1], an integer dtype, any device: the start of each sequence, and `tokens` at the end.
            tokens: the length of the row.
        """
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
        if cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
            raise TypeError(f"cu_seqlens must have an integer dtype, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(f"cu_seqlens must be [n + 1] with n >= 1, got {list(cu_seqlens.shape)}")
        lengths = cu_seqlens.diff()
        if not may_read(cu_seqlens):
            rises = (lengths > 0).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens)
            assert_on_device(rises, "cu_seqlens must rise from 0 to the number of tokens")
        elif not transformed():
            _check_starts(cu_seqlens.tolist(), tokens)
        ids = torch.arange(lengths.shape[0], dtype=torch.int32, device=cu_seqlens.device)
        return _make(ids.repeat_interleave(lengths, output_size=tokens).unsqueeze(0), 0)


def may_read(t: Tensor) -> bool:
    """Whether the values of `t` are there to be read: not on a GPU, which computes them later, nor on a meta device."""
    return t.device.type not in ("cuda", "meta")


def assert_on_device(condition: Tensor, message: str) -> None:
    """Lets the device of `condition`, bool [], check it when it is there, and stop with `message` if it is False.

    CUDA prints 255 characters of the message, and every later call of it raises.
    """
    if not transformed():
        torch._assert_async(condition, message)


def _check_starts(starts: list[int], tokens: int) -> None:
    """Raise ValueError unless the values of cu_seqlens rise from 0 to `tokens`."""
    if starts[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {starts[0]}")
    if starts[-1] != tokens:
        raise ValueError(f"cu_seqlens must end at tokens={tokens}, got {starts[-1]}")
    for previous, start in pairwise(starts):
        if start <= previous:
            raise ValueError(f"cu_seqlens must rise, got {start} after {previous}")


def _make(segments: Tensor, past: int) -> Sequence:
    """A Sequence; without `segments` if they are seen to be all 0: every row is then one sequence without padding."""
    sequence = Sequence(segments, past)
    return sequence if transformed() or not may_read(segments) or segments.any() else Sequence(None, past)


def _check_matrix(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dim() != 2:
        raise ValueError(f"{name} must be [batch, keys], got {list(value.shape)}")


def _check_mask(attention_mask: Tensor) -> Tensor:
    """The mask as bool; it may hold 0 and 1 only."""
    _check_matrix("attention_mask", attention_mask)
    if attention_mask.dtype == torch.bool:
        return attention_mask
    if transformed():
        return attention_mask != 0
    mask, allowed = attention_mask == 1, "attention_mask must hold 0 and 1 only"
    invalid = ~mask & (attention_mask != 0)
    if not may_read(invalid):
        assert_on_device(~invalid.any(), allowed)
    elif invalid.any():
        raise ValueError(f"{allowed}, got {attention_mask[invalid][0].item()}")
    return mask
