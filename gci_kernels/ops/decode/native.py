"""The decoding step in C++ (csrc/cpu/decode.cpp) for CPU tensors: base product and adapters in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gci_kernels.native import extension
from gci_kernels.ops.decode.group import Group, native_step


class Step:
    """A step of some adapters for some rows of x and y.

    It holds the addresses of the adapters' tensors, of the weight and of the bias: they must live, and stay where they
    are, for as long as it is used.

    Args:
        groups, rows, dtype: as :func:`native_step` takes them.
        weight, bias: [out, in] and [out] or None; weight None: y comes with the base product.
    """

    def __init__(
        self, groups: Sequence[Group], rows: Sequence[int], dtype: torch.dtype, weight: Tensor | None,
        bias: Tensor | None,
    ) -> None:  # fmt: skip
        module = extension()
        self._native = native_step(module, groups, rows, dtype, weight, bias)
        self._decode, self._decode_attend = module.decode, module.decode_attend
        self._out_features, self._in_features = groups[0].B.shape[0], groups[0].A.shape[1]
        self._output_shapes: dict[torch.Size, tuple[int, ...]] = {}  # by the shape of x

    def run(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The adapted layer's output.

        Args:
            x: [..., in] in the step's dtype.
            y: [..., out] like x, contiguous, with the base product, which is added to in place; None if the step has a
                weight.

        Returns:
            y, or a new tensor [..., out].
        """
        x = x.contiguous()
        if y is None:
            y = x.new_empty(self._output_shapes.get(x.shape) or self._output_shape(x))
        self._decode(
            self._native, x.data_ptr(), self._in_features, y.data_ptr(), self._out_features, torch.get_num_threads()
        )
        return y

    def attend(self, x: Tensor, y: Tensor | None, kv: Tensor, past: int | Tensor, segments: Tensor | None) -> Tensor:
        """:meth:`run` with attention, for one new token of each sequence; its k and v are written into the cache.

        Args:
            x, y: as :meth:`run` takes them.
            kv: [batch, capacity, at least 2 * rank] in the step's dtype, the last dimension contiguous; the cache,
                whose first `past` tokens are filled.
            past: below the capacity; a tensor holds one number.
            segments: [batch, at least past + 1] int32, rows contiguous; None: each row is one sequence.

        Raises:
            IndexError: the cache is full.
        """
        x = x.contiguous()
        if y is None:
            y = x.new_empty(self._output_shapes.get(x.shape) or self._output_shape(x))
        past = int(past)
        if not 0 <= past < kv.shape[1]:
            raise IndexError(f"the cache has a capacity of {kv.shape[1]} tokens, {past} of which are filled")
        self._decode_attend(
            self._native, x.data_ptr(), self._in_features, y.data_ptr(), self._out_features,
            kv.data_ptr(), kv.stride(0), kv.stride(1), kv.shape[1], past,
            0 if segments is None else segments.data_ptr(), 0 if segments is None else segments.stride(0),
            torch.get_num_threads(),
        )  # fmt: skip
        return y

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        shape = self._output_shapes[x.shape] = (*x.shape[:-1], self._out_features)
        return shape
