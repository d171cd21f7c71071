"""What the rows of a batch are: which positions belong together, which are padding, how many came before."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gci_kernels.ops.transforms import transformed


@dataclass(frozen=True, eq=False)
class Sequence:
    """What attention must know of a batch. Each row holds `keys` positions, the last `keys - past` being queries.

    The classmethods read their tensors' values to check them, which on a GPU waits for it: make one Sequence for a
    batch, not one for a layer. They leave `segments` out where every row is one sequence without padding. Where
    torch.jit.trace, torch.func and the like see the call, nothing is read and segments stay: a graph serves other
    values too.

    Attributes:
        segments: int32 [batch, keys], any device: the id of the packed sequence that a position belongs to, negative
            for padding. A position attends earlier ones, and itself, of its own id. None: each row is one sequence.
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
        """The sequences of some rows; rows: int64 [any], on the device of segments."""
        return self if self.segments is None else Sequence(self.segments.index_select(0, rows), self.past)

    @classmethod
    def from_mask(cls, attention_mask: Tensor, past: int = 0) -> "Sequence":
        """One sequence a row, padded anywhere.

        Args:
            attention_mask: [batch, keys], bool, integer or floating, any device: 1 for a position, 0 for padding.
            past: the number of keys before the first query.
        """
        return _make(_check_mask(attention_mask).int() - 1, past)

    @classmethod
    def from_position_ids(
        cls, position_ids: Tensor, past: int = 0, attention_mask: Tensor | None = None
    ) -> "Sequence":  # fmt: skip
        """Sequences packed into rows: a position that is not one more than that before it starts a new one.

        Args:
            position_ids: [batch, keys], an integer dtype, any device; of all keys, past ones too.
            past: the number of keys before the first query.
            attention_mask: as in :meth:`from_mask`, or None. Padding's position ids are not looked at; over padding
                inside a sequence they may stand still or run on.
        """
        _check_matrix("position_ids", position_ids)
        if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
            raise TypeError(f"position_ids must have an integer dtype, got {position_ids.dtype}")
        if position_ids.shape[1] == 0:
            return _make(position_ids.int(), past)
        if attention_mask is None:
            starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
            return _make(torch.nn.functional.pad(starts, (1, 0)).cumsum(1, dtype=torch.int32), past)
        real = _check_mask(attention_mask)
        if real.shape != position_ids.shape:
            wanted = list(position_ids.shape)
            raise ValueError(f"attention_mask must be {wanted} like position_ids, got {list(real.shape)}")
        column = torch.arange(real.shape[1], device=real.device).expand_as(real)
        last = torch.where(real, column, -1).cummax(1).values.roll(1, 1)  # the last real position before this one
        last[:, 0] = -1
        before = position_ids.gather(1, last.clamp(min=0))
        continues = (position_ids == before + 1) | (position_ids == before + (column - last))
        starts = real & ~continues & (last >= 0)
        return _make(torch.where(real, starts.cumsum(1), -1).int(), past)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, tokens: int) -> "Sequence":
        """Sequences packed into one row.

        Args:
            cu_seqlens: [n + 1], an integer dtype, any device: where each sequence starts, and at last `tokens`.
            tokens: the length of the row.
        """
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
        if cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
            raise TypeError(f"cu_seqlens must have an integer dtype, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(f"cu_seqlens must be [n + 1] with n >= 1, got {list(cu_seqlens.shape)}")
        if not transformed():
            _check_edges(cu_seqlens.tolist(), tokens)
        lengths = cu_seqlens.diff()
        ids = torch.arange(lengths.shape[0], dtype=torch.int32, device=cu_seqlens.device)
        return _make(ids.repeat_interleave(lengths, output_size=tokens).unsqueeze(0), 0)


def _check_edges(edges: list[int], tokens: int) -> None:
    if edges[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {edges[0]}")
    if edges[-1] != tokens:
        raise ValueError(f"cu_seqlens must end at tokens={tokens}, got {edges[-1]}")
    fall = next((i for i in range(1, len(edges)) if edges[i] <= edges[i - 1]), None)
    if fall is not None:
        raise ValueError(f"cu_seqlens must rise, got {edges[fall]} after {edges[fall - 1]}")


def _make(segments: Tensor, past: int) -> Sequence:
    """A Sequence, without segments where they say nothing."""
    sequence = Sequence(segments, past)
    return sequence if transformed() or segments.any() else Sequence(None, past)


def _check_matrix(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dim() != 2:
        raise ValueError(f"{name} must be [batch, keys], got {list(value.shape)}")


def _check_mask(attention_mask: Tensor) -> Tensor:
    """The mask as bool."""
    _check_matrix("attention_mask", attention_mask)
    if attention_mask.dtype == torch.bool:
        return attention_mask
    if transformed():
        return attention_mask != 0
    real = attention_mask == 1
    wrong = ~real & (attention_mask != 0)
    if wrong.any():
        raise ValueError(f"attention_mask must hold 0 and 1 only, got {attention_mask[wrong][0].item()}")
    return real
