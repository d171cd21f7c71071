"""A cached copy of a frozen weight in which the active rows replace its own, updated whenever they have changed."""

from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLES = 16  # rows and columns of the frozen weight that every call compares, on a CPU


@dataclass
class _Copy:
    """One device's copy, and what it was made from."""

    weight: Tensor  # [out, in], the frozen rows and the active ones
    frozen: tuple  # identity of the frozen rows' tensor
    sampled: tuple[slice, ...]  # which of its numbers are compared: up to about 16 x 16, spread over all of it
    sample: Tensor  # these numbers
    positions: Tensor  # [k], a copy
    positions_identity: tuple
    active: tuple  # identity of the active rows' tensor when they were last written into the copy


class MergedRows:
    """W' [out, in] for :func:`gci_kernels.ops.loki_linear`: W with the active rows, made once and then updated.

    A layer keeps one and passes it to every call. The copy costs the memory of another W. Its active rows are updated
    whenever the active weight has changed, by whatever means: on a CPU all their numbers are compared, which takes a
    few thousandths of the product's time; on a GPU, where a comparison would have to be waited for, they are written in
    each call. The whole copy is made again when W or the positions are other tensors or were written to. All writes
    that torch counts are detected. Of those that it does not count (`weight.data.add_`), a CPU detects those that
    change most of W, a GPU none: call :meth:`drop` after them.

    An update for a change that torch counts is itself counted, so a backward whose forward used the previous rows
    raises, as after any other write to a saved tensor. A deep copy or a pickle of this object is empty.
    """

    def __init__(self) -> None:
        # By device: the replicas of torch.nn.DataParallel, one for each device and thread, share this object.
        self._copies: dict[torch.device, _Copy] = {}

    def has(self, device: torch.device) -> bool:
        """Whether there is a copy on `device`."""
        return device in self._copies

    def copies(self) -> list[Tensor]:
        """The copies, [out, in], one for each device; for counting memory, not to be written to."""
        return [copy.weight for copy in self._copies.values()]

    def drop(self) -> None:
        """Delete the copies; the next call makes a new one."""
        self._copies.clear()

    def renewed(
        self, frozen: Tensor, active: Tensor, positions: Tensor, dtype: torch.dtype,
        frozen_positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The up-to-date copy, W' [out, in] in `dtype` on frozen's device; not to be written to.

        The arguments are those of :func:`merge_rows`.
        """
        copy, on_cpu = self._copies.get(frozen.device), frozen.device.type == "cpu"
        if copy is not None and copy.weight.dtype is dtype and identity(frozen) == copy.frozen:
            if on_cpu:  # nothing here is recorded for a gradient: the usual call needs no guards
                same = torch.equal(frozen.detach()[copy.sampled], copy.sample)
                same = same and torch.equal(positions, copy.positions)
            else:
                same = identity(positions) == copy.positions_identity
            if same:
                if not on_cpu or not torch.equal(
                    copy.weight.index_select(0, copy.positions), active.detach().to(dtype)
                ):
                    _write(copy, active)
                return copy.weight
        sampled = tuple(slice(None, None, max(size // _SAMPLES, 1)) for size in frozen.shape)
        with torch.inference_mode(False), torch.no_grad():
            weight = merge_rows(frozen, active, positions, dtype, frozen_positions)
            self._copies[frozen.device] = _Copy(
                weight, identity(frozen), sampled, frozen.detach()[sampled].clone(), positions.clone(),
                identity(positions), identity(active),
            )  # fmt: skip
        return weight

    def __deepcopy__(self, memo: dict) -> "MergedRows":
        return MergedRows()

    def __reduce__(self) -> tuple:
        return MergedRows, ()


def identity(tensor: Tensor) -> tuple:
    """A value that changes when `tensor` is replaced, moved, or written to in a way that torch counts."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tuple(tensor.shape), tensor.stride()


def merge_rows(
    frozen: Tensor, active: Tensor, positions: Tensor, dtype: torch.dtype, frozen_positions: Tensor | None
) -> Tensor:
    """W' [out, in] in `dtype`, a new tensor without a gradient, on frozen's device.

    Args:
        frozen: [out, in], any floating dtype; with `frozen_positions` [out - k, in].
        active: [k, in], any floating dtype.
        positions: [k] int64, distinct: the rows of W' that `active` holds.
        frozen_positions: [out - k] int64: the rows of W' that `frozen` holds; None: `frozen` has a row for each of W'.
    """
    out = frozen.shape[0] + (0 if frozen_positions is None else active.shape[0])
    weight = torch.empty(out, frozen.shape[1], dtype=dtype, device=frozen.device)
    if frozen_positions is None:
        weight.copy_(frozen.detach())
    else:
        weight.index_copy_(0, frozen_positions, frozen.detach().to(dtype))
    return weight.index_copy_(0, positions, active.detach().to(dtype))


def _write(copy: _Copy, active: Tensor) -> None:
    """Write the active rows into the copy."""
    active_identity = identity(active)
    with torch.inference_mode(False), torch.no_grad():
        rows = active.to(copy.weight.dtype)
        if copy.weight.device.type == "cpu" or active_identity != copy.active:
            copy.weight.index_copy_(0, copy.positions, rows)
        else:
            # The same numbers, or ones that changed without torch counting it. Writes through `data` are not counted
            # for the copy: a backward that still needs it must not fail because of a write that changed nothing.
            copy.weight.data.index_copy_(0, copy.positions, rows)
    copy.active = active_identity
