"""The step in C++ (csrc/cpu/decode.cpp) for CPU tensors: base product, adapters and their sum in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gci_kernels.native import extension
from gci_kernels.ops.decode.group import Group, native_step

_CPU = torch.device("cpu")


class Step:
    """A step of some adapters for some rows of x and y.

    Args:
        groups, rows, dtype: as native_step takes them.
        weight, bias: [out, in] and [out] or None; weight None: y comes with the base product.
    """

    def __init__(
        self, groups: Sequence[Group], rows: Sequence[int], dtype: torch.dtype, weight: Tensor | None,
        bias: Tensor | None,
    ) -> None:  # fmt: skip
        self.step, self.lib = native_step(extension(), groups, rows, dtype, weight, bias), extension()
        self.shapes: dict[torch.Size, tuple[int, ...]] = {}  # of y by that of x
        self.out_features, self.in_features = groups[0].B.shape[0], groups[0].A.shape[1]

    def run(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """y [..., out] for x [..., in], both in the step's dtype; y without gaps, None where the step has a weight."""
        x, y = self._operands(x, y)
        self.lib.decode(
            self.step, x.data_ptr(), self.in_features, y.data_ptr(), self.out_features, torch.get_num_threads()
        )
        return y

    def attend(self, x: Tensor, y: Tensor | None, kv: Tensor, past: int | Tensor, segments: Tensor | None) -> Tensor:
        """The same with attention, one new token of each sequence; its k and v are written into the cache.

        Args:
            kv: [batch, capacity, at least 2 * rank] in the step's dtype, numbers without gaps; filled up to `past`.
            past: below the capacity; a tensor holds one number.
            segments: [batch, at least past + 1] int32, rows without gaps, or None: all keys are seen.
        """
        x, y = self._operands(x, y)
        if isinstance(past, Tensor):
            past = int(past)
        if not 0 <= past < kv.shape[1]:
            raise IndexError(f"the cache has places for {kv.shape[1]} tokens, {past} of which are filled")
        self.lib.decode_attend(
            self.step, x.data_ptr(), self.in_features, y.data_ptr(), self.out_features,
            kv.data_ptr(), kv.stride(0), kv.stride(1), kv.shape[1], past,
            0 if segments is None else segments.data_ptr(), 0 if segments is None else segments.stride(0),
            torch.get_num_threads(),
        )  # fmt: skip
        return y

    def _operands(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        if y is None:
            shape = self.shapes.get(x.shape)
            if shape is None:
                shape = self.shapes[x.shape] = (*x.shape[:-1], self.out_features)
            y = torch.empty(shape, dtype=x.dtype, device=_CPU)
        return (x if x.is_contiguous() else x.contiguous()), y
