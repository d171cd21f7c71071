"""A copy of a frozen weight with the active rows in the place of its own, kept from call to call and never stale."""

from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLES = 16  # rows and columns of the frozen weight that are looked at again in every call, on a CPU


@dataclass
class _Copy:
    """One device's copy, and what it was made of."""

    weight: Tensor  # [out, in], the frozen rows and the active ones
    frozen: tuple  # identity of the frozen rows' tensor
    sample: Tensor  # a few of its numbers
    positions: Tensor  # [k], a copy
    where: tuple  # identity of the positions' tensor
    active: tuple  # identity of the active rows' tensor at their last renewal


class MergedRows:
    """W' [out, in] for :func:`gci_kernels.ops.loki_linear`: W with the active rows, made once and then renewed.

    A layer keeps one and hands it to every call. The copy costs the memory of another W. Its active rows are renewed
    when the active weight has changed, whoever changed it and however: on a CPU all their numbers are compared, which
    takes a few thousandths of the product's time; on a GPU, where an answer would have to be waited for, they are
    written each time. The whole copy is made anew when W or the positions are other tensors, or were written to. Writes
    that torch counts are all seen; of those that it does not count (`weight.data.add_`), on a CPU what changes most of
    W, and on a GPU none: call :meth:`drop` after them.

    A renewal for a change that torch counts is itself counted, so a backward whose forward used the rows before it
    raises, as after any other write to a tensor that was saved. A deep copy or a pickle of this object is an empty one.
    """

    def __init__(self) -> None:
        # By device: torch.nn.DataParallel gives its replicas, one a device and a thread, the same object.
        self._copies: dict[torch.device, _Copy] = {}

    def has(self, device: torch.device) -> bool:
        """Whether there is a copy on `device` already."""
        return device in self._copies

    def copies(self) -> list[Tensor]:
        """The copies that there are, [out, in], one for each device; to be counted, not written to."""
        return [copy.weight for copy in self._copies.values()]

    def drop(self) -> None:
        """Forget the copies; the next call makes a new one."""
        self._copies.clear()

    def renewed(
        self, frozen: Tensor, active: Tensor, positions: Tensor, dtype: torch.dtype, rest: Tensor | None = None
    ) -> Tensor:
        """The copy as it has to be now; not to be written to.

        Args:
            frozen: [out, in]; with `rest` [out - k, in].
            active: [k, in], any floating dtype.
            positions: [k] int64, distinct rows of the result.
            dtype: of the copy.
            rest: [out - k] int64, the rows of the result that `frozen` gives; None: all that are not active, its own.
        """
        with torch.inference_mode(False), torch.no_grad():
            copy = self._copies.get(frozen.device)
            if copy is None or copy.weight.dtype != dtype or not _made_of(copy, frozen, positions):
                weight = put_together(frozen, active, positions, dtype, rest)
                made_of = identity(frozen), _sample(frozen).clone(), positions.clone(), identity(positions)
                copy = self._copies[frozen.device] = _Copy(weight, *made_of, identity(active))
            else:
                _renew(copy, active)
        return copy.weight

    def __deepcopy__(self, memo: dict) -> "MergedRows":
        return MergedRows()

    def __reduce__(self) -> tuple:
        return MergedRows, ()


def identity(tensor: Tensor) -> tuple:
    """Equal for two looks at a tensor, unless it was replaced, moved, or written to in a way that torch counts."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tuple(tensor.shape), tensor.stride()


def _sample(frozen: Tensor) -> Tensor:
    steps = (max(size // _SAMPLES, 1) for size in frozen.shape)
    return frozen.detach()[tuple(slice(None, None, step) for step in steps)]


def _made_of(copy: _Copy, frozen: Tensor, positions: Tensor) -> bool:
    if identity(frozen) != copy.frozen or identity(positions) != copy.where:
        return False
    return frozen.device.type != "cpu" or (
        torch.equal(_sample(frozen), copy.sample) and torch.equal(positions, copy.positions)
    )


def put_together(frozen: Tensor, active: Tensor, positions: Tensor, dtype: torch.dtype, rest: Tensor | None) -> Tensor:
    """W' [out, in] in `dtype`, without a gradient; the arguments are those of :meth:`MergedRows.renewed`."""
    out = frozen.shape[0] + (0 if rest is None else active.shape[0])
    weight = torch.empty(out, frozen.shape[1], dtype=dtype, device=frozen.device)
    if rest is None:
        weight.copy_(frozen.detach())
    else:
        weight.index_copy_(0, rest, frozen.detach().to(dtype))
    return weight.index_copy_(0, positions, active.detach().to(dtype))


def _renew(copy: _Copy, active: Tensor) -> None:
    rows, present = active.to(copy.weight.dtype), identity(active)
    if copy.weight.device.type == "cpu":
        if not torch.equal(copy.weight.index_select(0, copy.positions), rows):
            copy.weight.index_copy_(0, copy.positions, rows)
    elif present != copy.active:
        copy.weight.index_copy_(0, copy.positions, rows)
    else:
        # The same numbers, or ones that changed unseen. `data` has a count of writes of its own: a backward that
        # still needs the copy is not told of a change that was none.
        copy.weight.data.index_copy_(0, copy.positions, rows)
    copy.active = present
